"""The table of elementwise operations that a block is made of, one row per implementation. Products are in `layers.py`.

T tokens, H hidden size, I intermediate size. `TORCH_OPS` runs anywhere and differentiates; on a GPU, `ops_for` gives the
Triton kernels of `kernels/block/fused.py`, for inference. Both compute norm statistics in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics float32, result in the dtype of x."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMS norm), both (T, H)."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up (T, 2 I), gate first: (T, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@dataclass(frozen=True)
class Ops:
    """What a block calls between its products."""

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor], Tensor]


TORCH_OPS = Ops("torch", rms_norm, add_rms_norm, silu_mul)


def ops_for(device: torch.device | str) -> Ops:
    """The operations that run best on this device without gradients."""
    return _fused_ops() if torch.device(device).type == "cuda" else TORCH_OPS


@lru_cache(maxsize=1)
def _fused_ops() -> Ops:
    from kernels.block import fused

    # programmatic dependent launch: each starts while the one before it drains; harmless where the neighbours do not
    return Ops(
        "triton",
        partial(fused.rms_norm, pdl=True),
        partial(fused.add_rms_norm, pdl=True),
        partial(fused.silu_mul, pdl=True),
    )
