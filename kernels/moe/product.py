"""The experts of a layer as one product: checks operands, picks kernels and tiles, and holds the torch reference.

T tokens, k experts of a token, A = T * k pairs, E experts, H hidden size, I intermediate size of an expert.
"""

import functools
import json
import math
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.moe.combine import launch_sum
from kernels.moe.few import MAX_PAIRS, FewTile, launch_few
from kernels.moe.many import ManyTile, launch_many
from kernels.moe.sorting import sort_pairs
from kernels.moe.weights import ExpertWeights
from kernels.w4a16.layout import W4Weight, restore

DTYPES = (torch.float16, torch.bfloat16)
Tile = FewTile | ManyTile


@dataclass(frozen=True)
class Size:
    """Sizes of a layer that decide which tiles suit it."""

    experts: int
    hidden: int
    inner: int


@dataclass(frozen=True)
class Entry:
    """The tiles of both products for up to `pairs` pairs of tokens and experts, as found on a layer of this size."""

    pairs: int
    gate_up: Tile
    down: Tile
    size: Size = Size(8, 4096, 14336)


# Used where a GPU has no table of its own: safe sizes for any device with tensor cores.
DEFAULTS = (
    Entry(256, FewTile(64, 4, 4), FewTile(64, 4, 4)),
    Entry(MAX_PAIRS, FewTile(64, 4, 4, 2), FewTile(64, 4, 4, 2)),
    Entry(1 << 62, ManyTile(64, 128, 4, 3), ManyTile(64, 128, 4, 3)),
)


def moe_mlp(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: ExpertWeights, down: ExpertWeights
) -> Tensor:
    """out[t] = sum_j weights[t, j] * down_e(silu(gate_e(x[t])) * up_e(x[t])) with e = chosen[t, j].

    x (T, H) fp16 or bf16; chosen (T, k) int32 or int64, below E; weights (T, k) float32; gate_up (paired rows) and down of
    all experts. Returns (T, H) in the dtype of x. On the CPU the torch reference runs. The same inputs give the same bits.
    Never waits for the device, so that it can be captured in a CUDA graph.
    Raises ValueError where a dtype, shape or device does not fit.
    """
    _check(x, chosen, weights, gate_up, down)
    if x.device.type == "cpu":
        return moe_reference(x, chosen, weights, gate_up, down)
    size = Size(gate_up.experts, gate_up.in_features, down.in_features)
    return run_tiles(x, chosen, weights, gate_up, down, pick(_table(x.device), chosen.numel(), size))


def run_tiles(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: ExpertWeights, down: ExpertWeights, entry: Entry
) -> Tensor:
    """`moe_mlp` with given tiles, for the dispatcher and for tuning."""
    tokens, topk = chosen.shape
    flat, factors = chosen.reshape(-1).int(), weights.reshape(-1)
    inner = torch.empty(tokens * topk, gate_up.out_features, dtype=x.dtype, device=x.device)
    parts = torch.empty(tokens * topk, down.out_features, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, down.out_features, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    sorted_for: dict[int, object] = {}
    for source, weight, tile, result, share, factor in (
        (x, gate_up, entry.gate_up, inner, topk, None),
        (inner, down, entry.down, parts, 1, factors),
    ):
        if isinstance(tile, FewTile):
            launch_few(source, flat, weight, tile, result, share, factor)
        else:
            pairs = sorted_for.setdefault(tile.bm, sort_pairs(chosen, weight.experts, tile.bm))
            launch_many(source, pairs, weight, tile, result, share, factor)  # type: ignore[arg-type]
    launch_sum(parts, out, topk)
    return out


def moe_reference(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: ExpertWeights, down: ExpertWeights
) -> Tensor:
    """The same in torch, expert by expert: float32 throughout, rounded once to the dtype of x."""
    out = torch.zeros(x.shape[0], down.out_features, device=x.device)
    for expert in chosen.unique().tolist():
        tokens, place = torch.where(chosen == expert)
        product = x[tokens].float() @ _floats(gate_up, expert).t()
        inner = F.silu(product[:, 0::2]) * product[:, 1::2]
        out.index_add_(0, tokens, (inner @ _floats(down, expert).t()) * weights[tokens, place, None])
    return out.to(x.dtype)


def _floats(weight: ExpertWeights, expert: int) -> Tensor:
    one = weight.of_expert(expert)
    return restore(one).dequantize() if isinstance(one, W4Weight) else one.float()


def _check(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: ExpertWeights, down: ExpertWeights) -> None:
    if x.dtype not in DTYPES and not (x.dtype == torch.float32 and x.device.type == "cpu"):
        raise ValueError(f"x is {x.dtype}; kernels of experts take torch.float16 or torch.bfloat16.")
    if x.ndim != 2 or x.shape[1] != gate_up.in_features:
        raise ValueError(f"x is {tuple(x.shape)}, expected (T, H) with H = {gate_up.in_features}.")
    if chosen.shape != weights.shape or chosen.ndim != 2 or chosen.shape[0] != x.shape[0]:
        raise ValueError(
            f"chosen is {tuple(chosen.shape)} and weights {tuple(weights.shape)}, expected (T, k) both with T = {x.shape[0]}."
        )
    if chosen.dtype not in (torch.int32, torch.int64) or weights.dtype != torch.float32:
        raise ValueError(
            f"chosen is {chosen.dtype}, weights {weights.dtype}: expected integers and torch.float32."
        )
    if not gate_up.is_paired or down.is_paired or gate_up.experts != down.experts:
        raise ValueError(
            "gate_up must have paired rows of gate and up, down plain ones, both of as many experts."
        )
    if gate_up.out_features != down.in_features:
        raise ValueError(f"gate_up gives {gate_up.out_features} features, down takes {down.in_features}.")
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if weight.words.device != x.device:
            raise ValueError(
                f"x is on {x.device} and {name} on {weight.words.device}; both must be on one device."
            )
        if weight.params is None and weight.words.dtype != x.dtype:
            raise ValueError(
                f"x is {x.dtype} and the float weight {name} {weight.words.dtype}: both must be one."
            )


def parse_entries(rows: list[dict[str, Any]]) -> tuple[Entry, ...]:
    """Rows {"experts", "hidden", "inner", "pairs", "gate_up": {"kernel": "few" | "many", ...}, "down": {...}} of a tile table."""
    return tuple(
        Entry(
            row["pairs"],
            _tile(row["gate_up"]),
            _tile(row["down"]),
            Size(row["experts"], row["hidden"], row["inner"]),
        )
        for row in rows
    )


def _tile(row: dict[str, Any]) -> Tile:
    fields = {key: value for key, value in row.items() if key != "kernel"}
    return FewTile(**fields) if row["kernel"] == "few" else ManyTile(**fields)


@functools.lru_cache(maxsize=4096)
def pick(table: tuple[Entry, ...], pairs: int, size: Size) -> Entry:
    """The entry of the most similar layer (by ratios of sizes) with the smallest number of pairs that is enough, else its last."""

    def distance(entry: Entry) -> float:
        wanted = (size.experts, size.hidden * size.inner)
        found = (entry.size.experts, entry.size.hidden * entry.size.inner)
        return sum(abs(math.log(a / b)) for a, b in zip(wanted, found, strict=True))

    nearest = min(table, key=distance).size
    alike = sorted((entry for entry in table if entry.size == nearest), key=lambda entry: entry.pairs)
    chosen = next((entry for entry in alike if pairs <= entry.pairs), alike[-1])
    if pairs <= MAX_PAIRS or not any(isinstance(tile, FewTile) for tile in (chosen.gate_up, chosen.down)):
        return chosen
    return DEFAULTS[-1]


@functools.cache
def table_for(name: str) -> tuple[Entry, ...]:
    """Tiles of the GPU called `name` ("NVIDIA H200" -> tuned/nvidia-h200.json), or the defaults."""
    file = resources.files("kernels.moe") / "tuned" / (re.sub(r"[^a-z0-9]+", "-", name.lower()) + ".json")
    return parse_entries(json.loads(file.read_text())["entries"]) if file.is_file() else DEFAULTS


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _table(device: torch.device) -> tuple[Entry, ...]:
    return table_for(_name(torch.cuda.current_device() if device.index is None else device.index))
