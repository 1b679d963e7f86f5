"""Fused query/key/value tensors taken apart and joined again. Both are moves of whole rows, so int4 codes pass through.

D head_dim, R query heads of a KV head. "thirds": all q rows, then all k, then all v (Qwen-1 c_attn).
"grouped": for each KV head its R query heads, its k, its v (InternLM2 wqkv).
"""

import torch
from torch import Tensor

from convert.checkpoint import LinearWeights
from convert.config import ModelConfig
from convert.families import FusedLayout
from kernels.int4 import Quantized


def fused_rows(config: ModelConfig) -> int:
    """Rows of the fused tensor."""
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def fused_order(layout: FusedLayout, config: ModelConfig) -> dict[str, Tensor]:
    """Role -> indices of its rows, in order, inside the fused tensor (int64)."""
    rows = torch.arange(fused_rows(config))
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if layout == "thirds":
        q, k, v = rows.split([queries, keys, keys])
        return {"q": q, "k": k, "v": v}
    slots = rows.view(config.num_kv_heads, config.query_group + 2, config.head_dim)
    return {"q": slots[:, :-2].reshape(-1), "k": slots[:, -2].reshape(-1), "v": slots[:, -1].reshape(-1)}


def take_rows(linear: LinearWeights, rows: Tensor) -> LinearWeights:
    """The linear with rows (out features) picked and ordered by `rows`."""
    bias = None if linear.bias is None else linear.bias[rows]
    weight = linear.weight
    if isinstance(weight, Quantized):
        return LinearWeights(
            Quantized(
                weight.codes[rows], weight.scales[rows], weight.zeros[rows], weight.group_size, weight.bits
            ),
            bias,
        )
    return LinearWeights(weight[rows], bias)


def split_fused(fused: LinearWeights, layout: FusedLayout, config: ModelConfig) -> dict[str, LinearWeights]:
    """Fused linear -> q, k, v."""
    return {role: take_rows(fused, rows) for role, rows in fused_order(layout, config).items()}


def join_fused(linears: dict[str, LinearWeights], layout: FusedLayout, config: ModelConfig) -> LinearWeights:
    """q, k, v -> the fused linear. Raises ValueError when some are quantized and some are not, or biases differ."""
    parts = [linears[role] for role in ("q", "k", "v")]
    order = torch.cat(list(fused_order(layout, config).values()))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))  # place[i]: where row i of the fused tensor lies in q | k | v
    biases = [part.bias for part in parts if part.bias is not None]
    if len(biases) not in (0, 3):
        raise ValueError("q, k and v must all have a bias or none of them, to be joined into one tensor.")
    bias = torch.cat(biases) if biases else None
    packed = [part.weight for part in parts if isinstance(part.weight, Quantized)]
    plain = [part.weight for part in parts if isinstance(part.weight, Tensor)]
    if len(plain) == 3:
        return take_rows(LinearWeights(torch.cat(plain), bias), place)
    if len(packed) != 3:
        raise ValueError("q, k and v must all be quantized or none of them, to be joined into one tensor.")
    joined = Quantized(
        torch.cat([p.codes for p in packed]),
        torch.cat([p.scales for p in packed]),
        torch.cat([p.zeros for p in packed]),
        packed[0].group_size,
        packed[0].bits,
    )
    return take_rows(LinearWeights(joined, bias), place)
