"""Fused query/key/value tensors taken apart and joined again. Both are moves of whole output features, so int4 codes pass through.

D head_dim, R query heads of a KV head. "thirds": all of q, then all of k, then all of v (Qwen-1 c_attn).
"grouped": for each KV head its R query heads, its k, its v (InternLM2 wqkv). Linears are in stored form, output features last.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from convert.checkpoint import Stored
from convert.config import ModelConfig
from convert.families.table import FusedLayout
from kernels.packing import SEQUENTIAL_ORDER, pack_columns, unpack_columns


def fused_rows(config: ModelConfig) -> int:
    """Output features of the fused tensor."""
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def fused_order(layout: FusedLayout, config: ModelConfig) -> dict[str, Tensor]:
    """Role -> indices of its output features, in order, inside the fused tensor (int64)."""
    features = torch.arange(fused_rows(config))
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if layout == "thirds":
        q, k, v = features.split([queries, keys, keys])
        return {"q": q, "k": k, "v": v}
    slots = features.view(config.num_kv_heads, config.query_group + 2, config.head_dim)
    return {"q": slots[:, :-2].reshape(-1), "k": slots[:, -2].reshape(-1), "v": slots[:, -1].reshape(-1)}


def split_stored(fused: Stored, layout: FusedLayout, config: ModelConfig) -> dict[str, Stored]:
    """Fused linear -> q, k, v."""
    return {role: _pick(fused, order) for role, order in fused_order(layout, config).items()}


def join_stored(linears: Mapping[str, Stored], layout: FusedLayout, config: ModelConfig) -> Stored:
    """q, k, v -> the fused linear. Raises ValueError when some are quantized and some are not, or biases differ."""
    order = torch.cat(list(fused_order(layout, config).values()))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))  # place[i]: where feature i of the fused tensor lies in q | k | v
    parts = [linears[role] for role in ("q", "k", "v")]
    if len({"bias" in part for part in parts}) > 1:
        raise ValueError("q, k and v must all have a bias or none of them, to be joined into one tensor.")
    if len({"words" in part for part in parts}) > 1:
        raise ValueError("q, k and v must all be quantized or none of them, to be joined into one tensor.")
    return _pick({name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}, place)


def _pick(linear: Stored, order: Tensor) -> Stored:
    """The output features `order` of every part."""
    return {name: _pick_words(part, order) if name == "words" else _pick_features(part, order)
            for name, part in linear.items()}  # fmt: skip


def _pick_features(part: Tensor, order: Tensor) -> Tensor:
    if part.dim() == 2 and part.t().is_contiguous():  # a float weight as the checkpoint holds it: whole rows
        return part.t()[order].t()
    return part.index_select(-1, order)


def _pick_words(words: Tensor, order: Tensor) -> Tensor:
    """Whole words where heads are whole words, else code by code."""
    eights = order.view(-1, 8)
    if bool((eights == eights[:, :1] + torch.arange(8)).all()) and bool((eights[:, 0] % 8 == 0).all()):
        return words.index_select(-1, eights[:, 0] // 8)
    return pack_columns(unpack_columns(words, SEQUENTIAL_ORDER).index_select(-1, order), SEQUENTIAL_ORDER)
