"""Fused tensors taken apart and joined again, and heads brought into the order of RoPE pairs that the engine has.

All are moves of whole output features, so int4 codes pass through. D head_dim, R query heads of a KV head. Linears are in
stored form, output features last.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from convert.config import ModelConfig
from convert.families.family import Fused
from convert.families.table import linear_shapes
from convert.linear import Stored
from kernels.packing import SEQUENTIAL_ORDER, pack_columns, unpack_columns


def fused_rows(fused: Fused, config: ModelConfig) -> int:
    """Output features of the fused tensor."""
    shapes = linear_shapes(config)
    return sum(shapes[role][0] for role in fused.roles)


def fused_order(fused: Fused, config: ModelConfig) -> dict[str, Tensor]:
    """Role -> indices of its output features, in order, inside the fused tensor (int64)."""
    shapes = linear_shapes(config)
    features = torch.arange(fused_rows(fused, config))
    if fused.layout == "stacked":
        return dict(zip(fused.roles, features.split([shapes[role][0] for role in fused.roles]), strict=True))
    slots = features.view(config.num_kv_heads, config.query_group + 2, config.head_dim)
    return {"q": slots[:, :-2].reshape(-1), "k": slots[:, -2].reshape(-1), "v": slots[:, -1].reshape(-1)}


def split_stored(linear: Stored, fused: Fused, config: ModelConfig) -> dict[str, Stored]:
    """The fused linear -> its linears by role."""
    return {role: pick_features(linear, order) for role, order in fused_order(fused, config).items()}


def join_stored(linears: Mapping[str, Stored], fused: Fused, config: ModelConfig) -> Stored:
    """Linears by role -> the fused linear. Raises ValueError when some are quantized and some are not, or biases differ."""
    order = torch.cat(list(fused_order(fused, config).values()))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))  # place[i]: where feature i of the fused tensor lies in q | k | v
    parts = [linears[role] for role in fused.roles]
    names = ", ".join(fused.roles)
    if len({"bias" in part for part in parts}) > 1:
        raise ValueError(f"{names} must all have a bias or none of them, to be joined into one tensor.")
    if len({"words" in part for part in parts}) > 1:
        raise ValueError(f"{names} must all be quantized or none of them, to be joined into one tensor.")
    return pick_features(
        {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}, place
    )


def rotary_order(config: ModelConfig) -> Tensor | None:
    """For each channel of a head in our order, where files hold it (D,) int64; None where the two orders are one.

    Ours has RoPE pairs (j, j + D / 2); channels that are not rotated are pairs of angle 0. The same order for q and k leaves
    every score q . k as it is.
    """
    size, rotated = config.head_dim, config.rotary_dim or config.head_dim
    if rotated == size and not config.rotary_interleaved:
        return None
    pairs = (
        torch.arange(rotated).view(-1, 2)
        if config.rotary_interleaved
        else torch.arange(rotated).view(2, -1).t()
    )
    still = torch.arange(rotated, size).view(2, -1)
    return torch.cat([pairs[:, 0], still[0], pairs[:, 1], still[1]])


def to_rotary_pairs(linears: dict[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """q and k among these linears with the channels of each head in our order; the others as they are."""
    return _reordered(linears, config, rotary_order(config))


def from_rotary_pairs(linears: Mapping[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """Inverse of `to_rotary_pairs`."""
    order = rotary_order(config)
    return _reordered(linears, config, None if order is None else order.argsort())


def norms_to_rotary_pairs(norms: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """q_norm and k_norm with their channels in our order."""
    return _reordered_norms(norms, rotary_order(config))


def norms_from_rotary_pairs(norms: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Inverse of `norms_to_rotary_pairs`."""
    order = rotary_order(config)
    return _reordered_norms(norms, None if order is None else order.argsort())


def _reordered(linears: Mapping[str, Stored], config: ModelConfig, order: Tensor | None) -> dict[str, Stored]:
    if order is None:
        return dict(linears)
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    return {
        role: pick_features(linear, _by_head(order, heads[role])) if role in heads else linear
        for role, linear in linears.items()
    }


def _reordered_norms(norms: Mapping[str, Tensor], order: Tensor | None) -> dict[str, Tensor]:
    if order is None:
        return dict(norms)
    return {
        role: norm[_by_head(order, len(norm) // len(order))] if role in ("q_norm", "k_norm") else norm
        for role, norm in norms.items()
    }


def _by_head(order: Tensor, heads: int) -> Tensor:
    return (torch.arange(heads)[:, None] * len(order) + order).flatten()


def pick_features(linear: Stored, order: Tensor) -> Stored:
    """The output features `order` of every part."""
    orders = {part.device: order.to(part.device) for part in linear.values()}
    return {name: (_pick_words if name == "words" else _pick_floats)(part, orders[part.device])
            for name, part in linear.items()}  # fmt: skip


def _pick_floats(part: Tensor, order: Tensor) -> Tensor:
    if part.dim() == 2 and part.t().is_contiguous():  # a float weight as the checkpoint holds it: whole rows
        return part.t()[order].t()
    return part.index_select(-1, order)


def _pick_words(words: Tensor, order: Tensor) -> Tensor:
    """Whole words where heads are whole words, else code by code."""
    if len(order) % 8 == 0:
        eights = order.view(-1, 8)
        if bool((eights == eights[:, :1] + torch.arange(8, device=order.device)).all()) and bool(
            (eights[:, 0] % 8 == 0).all()
        ):
            return words.index_select(-1, eights[:, 0] // 8)
    return pack_columns(unpack_columns(words, SEQUENTIAL_ORDER).index_select(-1, order), SEQUENTIAL_ORDER)
