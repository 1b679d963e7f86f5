"""Attention as closures: what a block hands its q, k and v to. Here those over complete sequences.

T tokens, B sequences of L tokens, Hq query heads, Hkv key heads, D head size. A paged cache brings its own closure.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.config import ModelConfig
from engine.model.rope import Rotary
from kernels.attention.paged import prefill_attention
from kernels.kv.int8 import store_kv
from kernels.kv.pages import BLOCK_SIZE, KVCache, StaticKV, allocate_cache

# layer, q (T, Hq, D), k (T, Hkv, D), v (T, Hkv, D), q and k after RoPE -> (T, Hq * D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class HeadNorms(NamedTuple):
    """RMS norms of each head of q and of k, (D,) each, before RoPE (Qwen3)."""

    q: Tensor
    k: Tensor
    eps: float


class FusedAttend(Protocol):
    """An `Attend` that can also rotate and store by itself, in one kernel; blocks prefer `attend_qkv` where it exists."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def attend_qkv(self, layer: int, qkv: Tensor, angles: Rotary, norms: HeadNorms | None) -> Tensor:
        """qkv (T, (Hq + 2 Hkv) * D) before head norms and RoPE, heads of q, then k, then v -> (T, Hq * D)."""
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


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """Attention whose scores s become cap * tanh(s / cap) (Gemma 2): (B, heads, L, D) each, mask (L, L) bool -> (B, heads, L, D)."""
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / cap)) * cap
    return scores.masked_fill(~mask, -torch.inf).float().softmax(-1).to(q.dtype) @ v


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
        window = window_of(config, layer)
        mask = None
        if window is not None and window < length:
            mask = masks.get(window)
            if mask is None:
                mask = masks[window] = window_mask(length, window, q.device)
        shares_heads = (
            group > 1 and q.is_cuda and mask is None
        )  # elsewhere torch leaves its flash path for that
        if group > 1 and not shares_heads:
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        if config.attention_softcap is not None:
            mask = window_mask(length, length, q.device) if mask is None else mask
            if shares_heads:
                k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
            out = capped_attention(q, k, v, mask, config.softmax_scale, config.attention_softcap)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=config.attention_scale,
                enable_gqa=shares_heads,
            )
        return out.transpose(1, 2).reshape(tokens, heads * size)

    return attend


def cached_attend(
    kv_bits: int, params: Sequence[StaticKV] | None = None
) -> Callable[[int, int, ModelConfig], Attend]:
    """As `causal_attend`, but keys and values go through real cache pages and the kernels that serve them.

    kv_bits 16 or 8; `params`, one a layer: static mode. One layer's pages serve all layers, since each is read at once.
    """

    def make(batch: int, length: int, config: ModelConfig) -> Attend:
        pages = -(-length // BLOCK_SIZE)
        caches: list[KVCache] = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            device = q.device
            if not caches:
                static = None if params is None else params[0]
                caches.append(
                    allocate_cache(
                        batch * pages, k.shape[1], k.shape[2], kv_bits, k.dtype, device, static=static
                    )
                )
            cache = (
                caches[0] if params is None else replace(caches[0], static=params[layer].stacked().to(device))
            )
            tables = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
            place = torch.arange(length, device=device)
            slots = (torch.arange(batch, device=device)[:, None] * (pages * BLOCK_SIZE) + place).flatten()
            store_kv(cache, k, v, slots)
            lengths = [length] * batch
            scale, window = config.softmax_scale, window_of(config, layer)
            return prefill_attention(
                q, cache, tables, lengths, lengths, scale, window, softcap=config.attention_softcap
            ).flatten(1)

        return attend

    return make
