"""Attention as closures: what a block hands its q, k and v to. Here the torch ones, over complete sequences.

T tokens, B sequences of L tokens, Hq query heads, Hkv key heads, D head size. A paged cache brings its own closure.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.config import ModelConfig
from engine.rope import Rotary

# layer, q (T, Hq, D), k (T, Hkv, D), v (T, Hkv, D), q and k after RoPE -> (T, Hq * D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class FusedAttend(Protocol):
    """An `Attend` that can also rotate and store by itself, in one kernel; blocks prefer `attend_qkv` where it exists."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def attend_qkv(self, layer: int, qkv: Tensor, angles: Rotary) -> Tensor:
        """qkv (T, (Hq + 2 Hkv) * D) before RoPE, heads of q, then k, then v -> (T, Hq * D)."""
        ...


def window_of(config: ModelConfig, layer: int) -> int | None:
    """Tokens that a query of this layer sees, itself included; None: all before it."""
    if config.sliding_window is None:
        return None
    if config.window_layers is not None and layer not in config.window_layers:
        return None
    return config.sliding_window


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """(L, L) bool, True where query i sees key j: i - window < j <= i."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def causal_attend(
    batch: int,
    length: int,
    config: ModelConfig,
    simulate_kv: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Attend:
    """Attention of B complete sequences of L tokens that lie flat one after another (T = B * L).

    simulate_kv(layer, k, v) -> (k, v), both (T, Hkv, D): what a quantized cache would return for them.
    """
    masks: dict[int, Tensor] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if simulate_kv is not None:
            k, v = simulate_kv(layer, k, v)
        tokens, heads, size = q.shape
        group = heads // k.shape[1]
        q, k, v = (t.view(batch, length, -1, size).transpose(1, 2) for t in (q, k, v))  # (B, heads, L, D)
        if group > 1:  # expanding is faster than enable_gqa on the CPU, where that leaves the flash path
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        window = window_of(config, layer)
        mask = None
        if window is not None and window < length:
            mask = masks.get(window)
            if mask is None:
                mask = masks[window] = window_mask(length, window, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return out.transpose(1, 2).reshape(tokens, heads * size)

    return attend
