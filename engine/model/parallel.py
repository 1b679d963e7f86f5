"""Tensor parallelism: which rows and columns of a block each rank holds, and the sums that make the ranks agree.

q, k, v, gate and up are split by rows (whole heads, whole groups of the intermediate size), o and down by columns, so
that each part of a block needs one sum over the ranks; embedding and norms are whole on every rank, the head is split by
rows of the vocabulary. A slice of int4 weights takes whole groups of scales: nothing is quantized again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import ModelConfig
from convert.errors import InputError
from convert.families.table import stays_float
from kernels.int4 import Quantized


@dataclass(frozen=True)
class TensorParallel:
    """This rank of `size`. all_reduce sums a tensor over the ranks and may do so in place; all_gather stacks, (size, ...)."""

    rank: int
    size: int
    all_reduce: Callable[[Tensor], Tensor]
    all_gather: Callable[[Tensor], Tensor]


def distributed() -> TensorParallel:
    """The process group of `torch.distributed` (nccl or gloo), which must have been started."""
    size = dist.get_world_size()

    def all_reduce(x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def all_gather(x: Tensor) -> Tensor:
        out = x.new_empty(size, *x.shape)
        dist.all_gather(list(out.unbind(0)), x.contiguous())
        return out

    return TensorParallel(dist.get_rank(), size, all_reduce, all_gather)


def shard_config(config: ModelConfig, rank: int, tp: int, group_size: int | None = None) -> ModelConfig:
    """What one rank computes: its own heads and intermediate size. With fewer KV heads than ranks, ranks share one.

    Raises InputError where heads cannot be split evenly.
    """
    if config.num_heads % tp or (config.num_kv_heads % tp and tp % config.num_kv_heads):
        raise InputError(
            f"{config.num_heads} query heads and {config.num_kv_heads} KV heads cannot be split over {tp} ranks: "
            "choose a --tp that divides both."
        )
    if config.qk_norm and config.qk_norm_width == "all" and tp > 1:
        raise InputError(
            f"A {config.family} model norms all heads of q and k together, so its heads cannot be split over {tp} ranks: use --tp 1."
        )
    names = ("intermediate_size", "expert_intermediate_size", "shared_intermediate_size")
    sizes: dict[str, Any] = {}
    for name in names:
        if size := getattr(config, name):
            start, stop = inner_range(size, rank, tp, group_size or 1)
            sizes[name] = stop - start
    return replace(
        config,
        num_heads=config.num_heads // tp,
        num_kv_heads=max(1, config.num_kv_heads // tp),
        **sizes,
    )


def inner_range(size: int, rank: int, tp: int, unit: int) -> tuple[int, int]:
    """Rows of gate and up (columns of down) of this rank: whole units, the first ranks one more where they do not divide."""
    units = math.ceil(size / unit)
    if units < tp:
        raise InputError(
            f"An intermediate size of {size} has {units} groups of {unit}, too few for {tp} ranks: "
            "choose a smaller --tp."
        )
    bounds = [min((r * (units // tp) + min(r, units % tp)) * unit, size) for r in (rank, rank + 1)]
    return bounds[0], bounds[1]


def shard_block(weights: BlockWeights, config: ModelConfig, rank: int, tp: int) -> BlockWeights:
    """This rank's part of a block; `config` is the whole model's. Biases of o and down stay with rank 0.

    Raises InputError where the columns of a rank would cut through a group of an int4 weight.
    """
    shard_config(config, rank, tp)
    size = config.head_dim
    heads = config.num_heads // tp
    queries = (rank * heads * size, (rank + 1) * heads * size)
    first = rank * config.num_kv_heads // tp
    keys = (first * size, (first + max(1, config.num_kv_heads // tp)) * size)
    linears = {}
    for role, part in weights.linears.items():
        kind = role.rsplit(".", 1)[-1]
        if kind == "q":
            linears[role] = take_rows(part, *queries)
        elif kind in ("k", "v"):
            linears[role] = take_rows(part, *keys)
        elif kind == "o":
            linears[role] = take_columns(part, *queries, role, rank)
        elif stays_float(role):
            linears[role] = part
        else:
            down = weights.linears[role.removesuffix(kind) + "down"].weight
            inner = inner_range(
                down.shape[1], rank, tp, down.group_size if isinstance(down, Quantized) else 1
            )
            linears[role] = (
                take_columns(part, *inner, role, rank) if kind == "down" else take_rows(part, *inner)
            )
    return replace(weights, linears=linears)


def take_rows(part: LinearWeights, start: int, stop: int) -> LinearWeights:
    """Out features start .. stop."""
    weight = part.weight
    bias = None if part.bias is None else part.bias[start:stop]
    if isinstance(weight, Quantized):
        rows = (t[start:stop] for t in (weight.codes, weight.scales, weight.zeros))
        codes, scales, zeros = rows
        return LinearWeights(Quantized(codes, scales, zeros, weight.group_size, weight.bits), bias)
    return LinearWeights(weight[start:stop], bias)


def take_columns(part: LinearWeights, start: int, stop: int, role: str, rank: int) -> LinearWeights:
    """In features start .. stop; the bias on rank 0 alone, since the parts are summed."""
    weight = part.weight
    bias = part.bias if rank == 0 else None
    if not isinstance(weight, Quantized):
        return LinearWeights(weight[:, start:stop], bias)
    group = weight.group_size
    if start % group or stop % group:
        raise InputError(
            f"{role}: rank {rank} would hold columns {start} to {stop}, which cuts a group of {group}: "
            "choose a smaller --tp or a smaller group size."
        )
    first, last = start // group, stop // group
    return LinearWeights(
        Quantized(
            weight.codes[:, start:stop].contiguous(),
            weight.scales[:, first:last].contiguous(),
            weight.zeros[:, first:last].contiguous(),
            group,
            weight.bits,
        ),
        bias,
    )


def shard_head(lm_head: Tensor, rank: int, tp: int) -> Tensor:
    """Rows of the head (V, H) of this rank: V / tp of them, or all where V cannot be split."""
    if lm_head.shape[0] % tp:
        return lm_head
    rows = lm_head.shape[0] // tp
    return lm_head[rank * rows : (rank + 1) * rows]


def gather_logits(parts: Tensor) -> Tensor:
    """(size, T, V / size) -> (T, V)."""
    return torch.cat(tuple(parts), dim=-1)
