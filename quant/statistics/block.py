"""What calibration keeps of a block: Gram matrices, means and maxima of linear inputs, ranges of K and V; and its file.

M tokens, K in features, D head size, Hkv key heads. Sums are float32 (token counts int64). Knows no search.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from convert.errors import InputError
from convert.hf.safetensors_files import read_header, read_tensor
from quant.records import GramStatistics
from quant.statistics.gram import outer_sum

BAD_ROW_SHARE = 0.1  # more rows with NaN or Inf than this stop the run


@dataclass
class InputStatistics:
    """Of one linear input: sums over the M tokens seen so far. `gram` is None where it is not asked for."""

    gram: Tensor | None
    sum_abs: Tensor  # (K,)
    max_abs: Tensor  # (K,)
    tokens: int = 0
    bad_rows: int = 0

    def add(self, x: Tensor) -> None:
        """Take in x (M, K). Rows with NaN or Inf are left out and counted."""
        magnitude = x.abs()
        peak = magnitude.amax(0).float()
        if not bool(torch.isfinite(peak).all()):
            good = torch.isfinite(magnitude).all(-1)
            self.bad_rows += int((~good).sum())
            self.tokens += int((~good).sum())
            x, magnitude = x[good], magnitude[good]
            if not len(x):
                return
            peak = magnitude.amax(0).float()
        if self.gram is not None:
            self.gram += outer_sum(x, x)
        self.sum_abs += magnitude.sum(0, dtype=torch.float32)
        self.max_abs = torch.maximum(self.max_abs, peak)
        self.tokens += x.shape[0]

    @property
    def good_tokens(self) -> int:
        return self.tokens - self.bad_rows


@dataclass
class BlockStatistics:
    """A tap that collects one block's statistics. `inputs` by name; ranges of K and V (Hkv, D) by "k" and "v"."""

    index: int
    with_grams: bool = True
    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    low: dict[str, Tensor] = field(default_factory=dict)
    high: dict[str, Tensor] = field(default_factory=dict)

    def tap(self, name: str, x: Tensor) -> None:
        """Take in a tensor of the forward pass, in the manner of `engine.model.block.Tap`."""
        if name in ("k", "v"):
            self._add_range(name, x)
            return
        part = self.inputs.get(name)
        if part is None:
            width, device = x.shape[-1], x.device
            square = torch.zeros(width, width, device=device) if self.with_grams else None
            part = InputStatistics(
                square, torch.zeros(width, device=device), torch.zeros(width, device=device)
            )
            self.inputs[name] = part
        part.add(x)

    def tap_ranges(self, name: str, x: Tensor) -> None:
        """As `tap`, for the ranges of K and V alone."""
        if name in ("k", "v"):
            self._add_range(name, x)

    def _add_range(self, name: str, x: Tensor) -> None:
        """x (M, Hkv, D). NaN and Inf stand out of the range; rows that hold one are counted elsewhere, as inputs of o."""
        x = x.float()
        infinite = torch.full_like(x[0], torch.inf)
        low = torch.where(torch.isfinite(x), x, infinite).amin(0)
        high = torch.where(torch.isfinite(x), x, -infinite).amax(0)
        self.low[name] = torch.minimum(self.low[name], low) if name in self.low else low
        self.high[name] = torch.maximum(self.high[name], high) if name in self.high else high

    def check(self) -> list[str]:
        """Warnings about left-out rows. Raises InputError where too many rows of an input are not finite."""
        notes = []
        for name, part in self.inputs.items():
            if not part.bad_rows:
                continue
            text = f"layer {self.index}, {name}: {part.bad_rows} of {part.tokens} rows hold NaN or Inf"
            if part.bad_rows > BAD_ROW_SHARE * part.tokens:
                raise InputError(
                    f"{text}, more than {BAD_ROW_SHARE:.0%}: the model overflows on this text. Use --dtype bfloat16 or "
                    f"float32, or check the weights of the layer before."
                )
            notes.append(f"{text}: left out.")
        return notes

    def head_ranges(self) -> dict[str, tuple[Tensor, Tensor]]:
        """ "k" and "v" -> minima and maxima (Hkv,) over tokens and channels."""
        return {name: (self.low[name].amin(-1), self.high[name].amax(-1)) for name in self.low}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file, on the CPU: upper triangles row by row, means and maxima, counts, ranges."""
        table: dict[str, Tensor] = {}
        for name, part in self.inputs.items():
            if part.gram is not None:
                table[f"{name}.gram"] = upper_triangle(part.gram.cpu())
            count = max(1, part.good_tokens)
            table[f"{name}.mean_abs"] = (part.sum_abs / count).cpu()
            table[f"{name}.max_abs"] = part.max_abs.cpu()
            table[f"{name}.tokens"] = torch.tensor([part.good_tokens], dtype=torch.int64)
        for name, (low, high) in self.head_ranges().items():
            table[f"{name}.min"], table[f"{name}.max"] = low.cpu(), high.cpu()
            table[f"{name}.channel_min"] = self.low[name].cpu()
            table[f"{name}.channel_max"] = self.high[name].cpu()
        return table


def upper_triangle(square: Tensor) -> Tensor:
    """Symmetric (K, K) -> its upper triangle with the diagonal, row by row: (K (K + 1) / 2,)."""
    return square[torch.ones(square.shape, dtype=torch.bool).triu()]


def from_upper_triangle(packed: Tensor, width: int) -> Tensor:
    """Inverse of `upper_triangle`: (K (K + 1) / 2,) -> symmetric (K, K)."""
    square = torch.zeros(width, width, dtype=packed.dtype)
    square[torch.ones(width, width, dtype=torch.bool).triu()] = packed
    return square + square.triu(1).t()


@dataclass(frozen=True)
class SavedStatistics:
    """One block's file, read back. Ranges: "k" and "v" -> minima, maxima, (Hkv, D) each."""

    grams: GramStatistics
    ranges: dict[str, tuple[Tensor, Tensor]]


def load_statistics(path: Path) -> SavedStatistics:
    """Read `block-XXXXX.safetensors`. Raises InputError where it is damaged."""
    infos = read_header(path)
    tensors = {name: read_tensor(info) for name, info in infos.items()}
    grams: dict[str, Tensor] = {}
    mean_abs: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name.endswith(".mean_abs"):
            key = name.removesuffix(".mean_abs")
            width = tensor.shape[0]
            packed = tensors.get(f"{key}.gram")
            if (
                packed is None
                or packed.shape != (width * (width + 1) // 2,)
                or f"{key}.tokens" not in tensors
            ):
                raise InputError(
                    f"{path.name} lacks the Gram matrix of {key}: give `quantize calibrate` again."
                )
            grams[key] = from_upper_triangle(packed, width)
            mean_abs[key] = tensor
            tokens[key] = int(tensors[f"{key}.tokens"])
    try:
        ranges = {n: (tensors[f"{n}.channel_min"], tensors[f"{n}.channel_max"]) for n in ("k", "v")}
    except KeyError as error:
        raise InputError(f"{path.name} lacks {error}: give `quantize calibrate` again.") from error
    return SavedStatistics(GramStatistics(grams, mean_abs, tokens), ranges)
