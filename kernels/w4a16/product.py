"""W4A16 products, y = x @ dequant(w).T: checks operands and picks kernel and tile by shape, from a table for each GPU.

M tokens, N rows of the weight, K in features. Kernels: `w4a16_gemv` (one token), `w4a16_split` (up to 32),
`w4a16_gemm` (up to some hundred), `w4a16_wgmma` (the same on Hopper, where Triton has Gluon), `w4a16_prefill` (more). `tuned/*.json` is written by scripts/tune_kernels.py; a GPU without one uses `tuned/defaults.json`.
"""

import functools
import importlib
import json
import math
import re
import warnings
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int4 import Quantized
from kernels.w4a16.gemm import launch_gemm
from kernels.w4a16.gemv import GemvTile, launch_gemv
from kernels.w4a16.layout import W4Weight, concat, pair, prepare, restore
from kernels.w4a16.prefill import PrefillTile, dequantize_then_matmul, launch_silu_pairs
from kernels.w4a16.schedule import GemmTile, WgmmaTile, Workspace
from kernels.w4a16.split import SplitTile, launch_split

__all__ = ["W4Weight", "concat", "pair", "prepare", "restore", "w4a16_linear", "w4a16_reference"]

Tile = GemvTile | SplitTile | GemmTile | WgmmaTile | PrefillTile
TILE_KINDS: dict[str, type[GemvTile | SplitTile | GemmTile | WgmmaTile | PrefillTile]] = {
    "gemv": GemvTile,
    "split": SplitTile,
    "gemm": GemmTile,
    "wgmma": WgmmaTile,
    "prefill": PrefillTile,
}
DTYPES = (torch.float16, torch.bfloat16)
INDEX_LIMIT = 2**31  # the kernels index with int32


@dataclass(frozen=True)
class Entry:
    """One row of a table: the tile for K x N weights and at most `tokens` tokens."""

    k: int
    n: int
    tokens: int
    tile: Tile


def w4a16_linear(
    x: Tensor, weight: W4Weight, residual: Tensor | None = None, *, is_dependent: bool = False
) -> Tensor:
    """f(x @ dequant(weight).T + bias) + residual, where f is the identity, or silu(gate) * up for a paired weight.

    x (..., K) fp16 or bf16 (on the CPU also float32); residual (..., out_features) of the dtype of x. Returns
    (..., out_features) in the dtype of x. On the GPU sums are float32 with one rounding at the end (two with a bias,
    residual or paired weight in the prefill regime), and the same inputs give the same bits. On the CPU the torch reference runs.
    `is_dependent` starts the kernel before the one ahead of it in the stream has ended (programmatic dependent launch):
    correct behind any kernel but one that writes the weight, faster where the neighbours do so too.
    A first call on a device allocates scratch memory: make it before capturing a CUDA graph (RuntimeError inside one), and
    keep products of one device in one stream.
    Raises ValueError where a dtype, shape or device does not fit.
    """
    _check(x, weight, residual)
    if x.device.type == "cpu":
        return w4a16_reference(x, weight, residual)
    rows = x.reshape(-1, weight.in_features)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(rows.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        flat = None if residual is None else residual.reshape(-1, weight.out_features).contiguous()
        tile = _tile(_index(x.device), rows.shape[0], weight.rows, weight.in_features)
        run_tile(tile, rows, weight, out, flat, is_dependent)
    return out.view(*x.shape[:-1], weight.out_features)


def run_tile(
    tile: Tile,
    x: Tensor,
    weight: W4Weight,
    out: Tensor,
    residual: Tensor | None = None,
    is_dependent: bool = False,
) -> None:
    """Write the product of x (M, K) to out (M, out_features) with a given tile; for the dispatcher and for tuning."""
    if isinstance(tile, GemvTile):
        launch_gemv(x, weight, tile, out, residual, is_dependent)
    elif isinstance(tile, SplitTile):
        launch_split(x, weight, tile, workspace_of(x.device), out, residual, is_dependent)
    elif isinstance(tile, GemmTile):
        launch_gemm(
            x, weight, tile, multiprocessors(x.device), workspace_of(x.device), out, residual, is_dependent
        )
    elif isinstance(tile, WgmmaTile):
        launch = importlib.import_module("kernels.w4a16.wgmma").launch_wgmma  # only where Triton has Gluon
        launch(
            x, weight, tile, multiprocessors(x.device), workspace_of(x.device), out, residual, is_dependent
        )
    elif weight.is_paired or weight.bias is not None or residual is not None:
        product = torch.empty(x.shape[0], weight.rows, dtype=x.dtype, device=x.device)
        dequantize_then_matmul(x, weight, tile, product)
        if weight.is_paired and weight.bias is None and residual is None:
            launch_silu_pairs(product, out)
        else:
            out.copy_(_epilogue(product, weight, residual))
    else:
        dequantize_then_matmul(x, weight, tile, out)


def w4a16_reference(x: Tensor, weight: W4Weight, residual: Tensor | None = None) -> Tensor:
    """The same in torch: float32 throughout, rounded once to the dtype of x."""
    product = x.float() @ restore(weight).dequantize().t()
    return _epilogue(product, weight, residual).to(x.dtype)


def _epilogue(product: Tensor, weight: W4Weight, residual: Tensor | None) -> Tensor:
    """f(product (..., N) + bias) + residual in the dtype of `product`."""
    if weight.bias is not None:
        product = product + weight.bias.to(product.dtype)
    if weight.is_paired:
        product = F.silu(product[..., 0::2]) * product[..., 1::2]
    return product if residual is None else product + residual.to(product.dtype)


def _check(x: Tensor, weight: W4Weight, residual: Tensor | None) -> None:
    if x.dtype not in DTYPES and not (x.dtype == torch.float32 and x.device.type == "cpu"):
        raise ValueError(f"x is {x.dtype}; W4A16 kernels take torch.float16 or torch.bfloat16.")
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes K = {weight.in_features}.")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and the weight on {weight.device}; both must be on one device.")
    if residual is not None:
        expected = (*x.shape[:-1], weight.out_features)
        if tuple(residual.shape) != expected or residual.dtype != x.dtype or residual.device != x.device:
            raise ValueError(
                f"residual is {tuple(residual.shape)} {residual.dtype} on {residual.device}, expected {expected} "
                f"{x.dtype} on {x.device}."
            )


def parse_table(document: dict[str, Any]) -> tuple[Entry, ...]:
    """Entries of a table as read from JSON. Raises ValueError where a row names no kernel or lacks a field."""
    entries = []
    for row in document["entries"]:
        fields = {key: value for key, value in row.items() if key not in ("k", "n", "tokens", "kernel")}
        try:
            tile = TILE_KINDS[row["kernel"]](**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"row {row} of a tile table is no tile of {sorted(TILE_KINDS)}: {error}"
            ) from error
        entries.append(Entry(row["k"], row["n"], row["tokens"], tile))
    return tuple(entries)


@functools.cache
def table_for(name: str) -> tuple[Entry, ...]:
    """The table of the GPU called `name` ("NVIDIA H200" -> tuned/nvidia-h200.json), or the defaults."""
    folder = resources.files("kernels") / "tuned"
    file = folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()) + ".json")
    if not file.is_file():
        file = folder / "defaults.json"
    return parse_table(json.loads(file.read_text()))


class Shape(Protocol):
    """What a choice of tile reads of a weight."""

    @property
    def rows(self) -> int: ...
    @property
    def in_features(self) -> int: ...


class Size(NamedTuple):
    """A weight of which only the shape matters: a `Shape`."""

    rows: int
    in_features: int


def pick(table: tuple[Entry, ...], tokens: int, weight: Shape, has_wgmma: bool = False) -> Tile:
    """The tile of the shape nearest to that of `weight` (by ratios), of the smallest number of tokens that is enough.

    Entries of `w4_wgmma` are passed over without `has_wgmma`, and for a K or N that its bulk copies cannot take.
    """
    if tokens * max(weight.rows, weight.in_features) >= INDEX_LIMIT:
        return PrefillTile(0)
    if not has_wgmma or weight.in_features % 8 or weight.rows % 4:
        table = tuple(entry for entry in table if not isinstance(entry.tile, WgmmaTile))
        if not table:
            return PrefillTile(0)

    def distance(entry: Entry) -> float:
        size = entry.k * entry.n / (weight.in_features * weight.rows)
        return abs(math.log(size)) + 0.5 * abs(math.log(entry.n / weight.rows))

    nearest = min(table, key=distance)
    shape = [entry for entry in table if (entry.k, entry.n) == (nearest.k, nearest.n)]
    enough = [entry for entry in shape if entry.tokens >= tokens]
    chosen = (
        min(enough, key=lambda entry: entry.tokens) if enough else max(shape, key=lambda entry: entry.tokens)
    )
    return chosen.tile


@functools.lru_cache(maxsize=4096)
def _tile(index: int, tokens: int, rows: int, in_features: int) -> Tile:
    """`pick` on the table of a device, remembered: it costs more than the launch, and a step asks again for each layer."""
    table = table_for(_device_name(index))
    named = any(isinstance(entry.tile, WgmmaTile) for entry in table)  # the trial costs some seconds
    return pick(table, tokens, Size(rows, in_features), named and has_wgmma(index))


@functools.cache
def has_wgmma(index: int) -> bool:
    """Whether `w4_wgmma` runs on a device: compute capability 9.0, and a Triton whose Gluon compiles it (tried once)."""
    if torch.cuda.get_device_capability(index) != (9, 0):
        return False
    device = torch.device("cuda", index)
    codes = torch.zeros(64, 128, dtype=torch.uint8, device=device)
    ones = torch.ones(64, 1, device=device)
    weight = prepare(Quantized(codes, ones.half(), ones.to(torch.uint8), 128))
    out = torch.empty(16, 64, dtype=torch.float16, device=device)
    try:
        run_tile(WgmmaTile(16, 64, 1, 2, 0), torch.ones(16, 128, device=device).half(), weight, out)
        return bool((out == -128).all())
    except (
        Exception
    ) as error:  # each version of Triton fails in its own way: a missing name, the compiler, the launch
        warnings.warn(f"W4A16 products do without w4_wgmma: {type(error).__name__}: {error}", stacklevel=2)
        return False


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@functools.cache
def _workspace(index: int) -> Workspace:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"The first W4A16 product on cuda:{index} is inside a graph capture, where its scratch memory would belong to the graph: "
            "run one product of that device before the capture."
        )
    return Workspace.on(torch.device("cuda", index))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def table_of(device: torch.device) -> tuple[Entry, ...]:
    return table_for(_device_name(_index(device)))


def multiprocessors(device: torch.device) -> int:
    return _multiprocessors(_index(device))


def workspace_of(device: torch.device) -> Workspace:
    return _workspace(_index(device))
