"""Keys whose channels are alike in size, so that one scale serves a whole head of the KV cache: factors moved from K into Q.

Hq query and Hkv key heads of size D, H hidden size. RoPE rotates the pairs (j, j + D / 2) of a head: every family is read into
this order, channels that are not rotated are pairs of angle 0, and scalings of RoPE change angles or all of q and k alike. So one
factor s for both members of a pair passes through it: (s q) . (k / s) = q . k. Where q and k are normed before RoPE, the norms'
weights take s.
"""

from dataclasses import replace

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import ModelConfig
from kernels.int4 import Quantized
from quant.settings import KEY_SMOOTHING
from quant.statistics.block import BlockStatistics
from quant.statistics.chunked_block import ChunkedBlock

DEAD = 1e-6  # pairs below this share of their head's largest keep 1
_ROOM = 32768.0  # what scaled weights stay below: half of fp16's range

Channels = tuple[Tensor, Tensor]  # minima and maxima (Hkv, D) over tokens, after RoPE


def key_channels(weights: BlockWeights, config: ModelConfig, stream: Tensor) -> Channels:
    """Ranges of the block's K after RoPE on hidden states (S, L, H), in their dtype; nothing is attended to."""
    parts = ChunkedBlock(config, stream)
    roles = {role: weights.linears[role] for role in ("q", "k", "v")}
    empty = LinearWeights(torch.empty(0, config.num_heads * config.head_dim))
    dense = parts.dense(replace(weights, linears={**roles, "o": empty}))
    seen = BlockStatistics(weights.index)
    for part in parts.slices():
        parts.rotated_keys(parts.read(stream[part], weights, "attn_norm"), dense, seen.tap_ranges)
    return seen.low["k"].cpu(), seen.high["k"].cpu()


def key_factors(weights: BlockWeights, config: ModelConfig, channels: Channels) -> Tensor:
    """What K is divided by: (Hkv, D) float32, equal within a RoPE pair, of geometric mean 1 in every head before the limits.

    Heads share their factors where norms carry them. Dead pairs, ranges that are not finite and quantized weights give 1; a factor
    is held back where a weight or bias would come near the end of fp16.
    """
    low, high = (part.float().cpu() for part in channels)
    factors = torch.ones_like(low)
    if any(isinstance(weights.linears[role].weight, Quantized) for role in ("q", "k")):
        return factors
    peak = torch.maximum(-low, high)
    pairs = peak.view(len(peak), 2, -1).amax(1)  # (Hkv, D / 2)
    pairs = torch.where(pairs.isfinite(), pairs.clamp(min=0), torch.zeros_like(pairs))
    if config.qk_norm and config.qk_norm_width == "head":
        pairs = pairs.amax(0, keepdim=True)
    alive = pairs > DEAD * pairs.amax(1, keepdim=True)
    logs = torch.where(
        alive, KEY_SMOOTHING.exponent * torch.where(alive, pairs, torch.ones_like(pairs)).log(), 0
    )
    logs = logs - logs.sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)
    raised = torch.where(alive, logs.exp(), torch.ones_like(logs)).clamp(
        1 / KEY_SMOOTHING.limit, KEY_SMOOTHING.limit
    )
    largest_q, largest_k = (
        size.view(len(raised), -1, 2, raised.shape[1]).amax((1, 2)) for size in _sizes(weights, config)
    )
    raised = torch.minimum(raised, (_ROOM / largest_q).clamp(min=1))
    raised = torch.maximum(raised, (largest_k / _ROOM).clamp(max=1))
    return factors * torch.cat([raised, raised], 1)


def smooth_keys(weights: BlockWeights, config: ModelConfig, factors: Tensor) -> BlockWeights:
    """The same function of its input with K divided by `factors` (Hkv, D) and Q multiplied, float32 where they are.

    All query heads of a KV head take its factors. With norms of q and k head by head, the factors must be the same for every head.
    """
    if bool((factors == 1).all()):
        return weights
    if config.qk_norm:
        scale = {"q_norm": factors[0], "k_norm": 1 / factors[0]}
        if config.qk_norm_width == "all":
            spread = factors[:, None].expand(-1, config.query_group, -1)
            scale = {"q_norm": spread.flatten(), "k_norm": (1 / factors).flatten()}
        scaled = {
            role: norm.float() * scale[role].to(norm.device)
            for role, norm in weights.norms.items()
            if role in scale
        }
        return replace(weights, norms={**weights.norms, **scaled})
    spread = factors[:, None].expand(-1, config.query_group, -1)  # (Hkv, Hq / Hkv, D)
    rows = {"q": spread.flatten(), "k": (1 / factors).flatten()}
    linears = {role: _scaled(weights.linears[role], scale) for role, scale in rows.items()}
    return replace(weights, linears={**weights.linears, **linears})


def smooth_channels(channels: Channels, factors: Tensor) -> Channels:
    """The ranges that K has once it is divided by `factors` (Hkv, D)."""
    return channels[0] / factors, channels[1] / factors


def _sizes(weights: BlockWeights, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Largest magnitude of what takes the factors: of q by row (Hq * D,) and of k (Hkv * D,); of norms (D,) and (D,)."""
    if config.qk_norm:
        return weights.norms["q_norm"].float().abs().cpu(), weights.norms["k_norm"].float().abs().cpu()
    found = []
    for role in ("q", "k"):
        part = weights.linears[role]
        assert isinstance(part.weight, Tensor)
        size = part.weight.abs().amax(1).float()
        found.append((size if part.bias is None else torch.maximum(size, part.bias.abs().float())).cpu())
    return found[0], found[1]


def _scaled(part: LinearWeights, rows: Tensor) -> LinearWeights:
    """Rows of the weight (N, K) and of the bias multiplied by `rows` (N,), float32."""
    assert isinstance(part.weight, Tensor)
    rows = rows.to(part.weight.device)
    return LinearWeights(
        part.weight.float() * rows[:, None], None if part.bias is None else part.bias.float() * rows
    )
