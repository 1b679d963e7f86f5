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

from convert.config import Activation


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics float32, result in the dtype of x.

    A float32 weight multiplies in float32.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed.to(x.dtype) * weight).to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMS norm), both (T, H)."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up (T, 2 I), gate first: (T, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, with the tanh form of gelu (Hendrycks and Gimpel, 2016), for gate_up (T, 2 I), gate first: (T, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def activate(name: Activation, gate: Tensor) -> Tensor:
    """The activation of a gate."""
    return F.silu(gate) if name == "silu" else F.gelu(gate, approximate="tanh")


@dataclass(frozen=True)
class Ops:
    """What a block calls between its products."""

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor], Tensor]

    def gated_mul(self, name: Activation) -> Callable[[Tensor], Tensor]:
        """The activation of a gate times up, both in one tensor (T, 2 I)."""
        return self.silu_mul if name == "silu" else gelu_tanh_mul


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
