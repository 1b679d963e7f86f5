"""The weight files of a TurboMind workspace as linears and norms: the inverse of `workspace_tensors`. Pure: no disk.

Padding, KV copies and the RoPE order are undone, so that a linear is again what the checkpoint held, bit for bit.
K in features, N out features, R rank of tp.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from convert.checkpoint import Stored
from convert.errors import InputError
from convert.families.table import bias_roles
from convert.formats import Dialect
from convert.turbomind import layout as layout
from convert.turbomind.packing import GROUP_SIZE, Packing
from convert.turbomind.shapes import part_shapes

Read = Callable[[str], Tensor]  # file name -> tensor of the shape and dtype that `workspace_shapes` lists


def read_norms(index: int, read: Read) -> dict[str, Tensor]:
    """The norms of block `index` by role."""
    names = (("attn_norm", "attention_norm"), ("mlp_norm", "ffn_norm"))
    return {role: read(f"layers.{index}.{name}.weight") for role, name in names}


def read_linears(index: int, roles: Iterable[str], read: Read, packing: Packing) -> dict[str, Stored]:
    """Linears of block `index` by role, in the checkpoint's own order; a file that holds several is read once."""
    wanted, prefix = list(roles), f"layers.{index}."
    found: dict[str, Stored] = {}
    for role in wanted:
        if role in found:
            continue
        if role in ("q", "k", "v"):
            found |= _qkv(_read_ranks(prefix + "attention.w_qkv", read, packing), packing)
        elif role == "o":
            found[role] = layout.join_inputs(_read_ranks(prefix + "attention.wo", read, packing))
        elif role == "router":
            found[role] = {"weight": read(f"{prefix}moe_ffn.gate.weight")}
        else:
            found |= _mlp(role, prefix, read, packing)
    biased = bias_roles(packing.config)
    for role in wanted:
        if role not in biased:
            found[role].pop("bias", None)
    return {role: found[role] for role in wanted}


def _qkv(ranks: list[Stored], packing: Packing) -> dict[str, Stored]:
    heads = packing.config.head_dim
    q, k, v = layout.split_qkv(ranks, *packing.rank_rows)
    k, v = (layout.unreplicate_heads(part, heads, packing.replication) for part in (k, v))
    return {"q": layout.separate_rope(q, heads), "k": layout.separate_rope(k, heads), "v": v}


def _mlp(role: str, prefix: str, read: Read, packing: Packing) -> dict[str, Stored]:
    """`role` of an MLP, and what lies in the same files."""
    expert, _, kind = role.rpartition(".")
    module = f"{prefix}moe_ffn.{expert}." if expert else f"{prefix}feed_forward."
    size = packing.config.intermediate_size
    if kind == "down":
        down = layout.join_inputs(_read_ranks(module + "w2", read, packing))
        return {role: layout.cut_inputs(down, size, GROUP_SIZE)}
    if packing.fuses_gate_up:
        pairs = [layout.separate_gate_up(linear) for linear in _read_ranks(module + "w13", read, packing)]
        gate, up = (layout.join_outputs([pair[i] for pair in pairs]) for i in range(2))
        front = role.removesuffix(kind)
        return {front + "gate": layout.cut_outputs(gate, size), front + "up": layout.cut_outputs(up, size)}
    ranks = _read_ranks(module + ("w1" if kind == "gate" else "w3"), read, packing)
    return {role: layout.cut_outputs(layout.join_outputs(ranks), size)}


def _read_ranks(module: str, read: Read, packing: Packing) -> list[Stored]:
    biased = packing.attn_bias and ".attention." in module
    parts = part_shapes(packing, 32, GROUP_SIZE, biased)
    return [
        decode({part: read(f"{module}.{rank}.{part}") for part in parts}, packing.dialect, f"{module}.{rank}")
        for rank in range(packing.tp)
    ]


def decode(tensors: Stored, dialect: Dialect, where: str) -> Stored:
    """Inverse of `workspace_tensors.encode`. Raises InputError, naming `where`, for zero points that are no integers from 0 to 15."""
    bias = {"bias": tensors["bias"]} if "bias" in tensors else {}
    if "weight" in tensors:
        return {"weight": tensors["weight"]} | bias
    if dialect == "0.1":
        scales, zeros = layout.split_scales_zeros(tensors["scales_zeros"])
        return {"words": layout.unpack_tiles(tensors["qweight"]), "scales": scales, "zeros": zeros} | bias
    zeros = tensors["zeros"]
    if not bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= 15)).all()):
        raise InputError(
            f"{where}.zeros: zero points are not integers from 0 to 15. The file is damaged or of another dialect; pack again."
        )
    scales, zeros = tensors["scales"], zeros.to(torch.uint8)
    return {"words": tensors["qweight"], "scales": scales, "zeros": zeros} | bias
