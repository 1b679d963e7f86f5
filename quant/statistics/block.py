"""What calibration keeps of a block: Gram matrices, means and maxima of linear inputs, ranges of K and V; and its file.

M tokens, K in features, D head size, Hkv key heads. Knows no search.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from convert.errors import InputError
from convert.hf.safetensors_files import read_header, read_tensor
from quant.statistics.gram import GramAccumulator, InputStatistics


@dataclass
class BlockStatistics:
    """A tap that collects one block's statistics. `inputs` by name; ranges of K and V (Hkv, D) by "k" and "v"."""

    index: int
    inputs: dict[str, GramAccumulator] = field(default_factory=dict)
    low: dict[str, Tensor] = field(default_factory=dict)
    high: dict[str, Tensor] = field(default_factory=dict)

    def tap(self, name: str, x: Tensor) -> None:
        """Take in a tensor of the forward pass, in the manner of `engine.model.block.Tap`."""
        if name in ("k", "v"):
            self._add_range(name, x)
            return
        if name not in self.inputs:
            self.inputs[name] = GramAccumulator(x.shape[-1], x.device, hold_out=False)
        self.inputs[name].add(x[None])

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
        """Remarks about tokens that were left out. Raises InputError where too many tokens of an input are not finite."""
        notes = [part.check(f"layer {self.index}, {name}") for name, part in self.inputs.items()]
        return [note for note in notes if note]

    def head_ranges(self) -> dict[str, tuple[Tensor, Tensor]]:
        """ "k" and "v" -> minima and maxima (Hkv,) over tokens and channels."""
        return {name: (self.low[name].amin(-1), self.high[name].amax(-1)) for name in self.low}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file, on the CPU: upper triangles row by row, means and maxima, counts, ranges."""
        table: dict[str, Tensor] = {}
        for name, part in self.inputs.items():
            table[f"{name}.gram"] = upper_triangle(part.gram_sum.cpu())
            table[f"{name}.mean_abs"] = part.mean_abs.cpu()
            table[f"{name}.max_abs"] = part.max_abs.cpu()
            table[f"{name}.tokens"] = torch.tensor([part.tokens], dtype=torch.int64)
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
    """One block's file, read back: statistics of the float stream by the name of the input ("attn_in", "o_in", "mlp_in",
    "down_in", "experts.{e}.in", "experts.{e}.down_in"), and ranges: "k" and "v" -> minima, maxima, (Hkv, D) each.
    """

    inputs: dict[str, InputStatistics]
    ranges: dict[str, tuple[Tensor, Tensor]]


def load_statistics(path: Path) -> SavedStatistics:
    """Read `block-XXXXX.safetensors`. Raises InputError where it is damaged."""
    tensors = {name: read_tensor(info) for name, info in read_header(path).items()}
    inputs: dict[str, InputStatistics] = {}
    for name, mean_abs in tensors.items():
        if not name.endswith(".mean_abs"):
            continue
        key, width = name.removesuffix(".mean_abs"), mean_abs.shape[0]
        packed = tensors.get(f"{key}.gram")
        if packed is None or packed.shape != (width * (width + 1) // 2,) or f"{key}.tokens" not in tensors:
            raise InputError(f"{path.name} lacks the Gram matrix of {key}: give `quantize calibrate` again.")
        tokens = int(tensors[f"{key}.tokens"])
        gram = from_upper_triangle(packed, width).float() / max(tokens, 1)
        inputs[key] = InputStatistics(gram, gram, gram, mean_abs.float(), tokens)
    try:
        ranges = {n: (tensors[f"{n}.channel_min"], tensors[f"{n}.channel_max"]) for n in ("k", "v")}
    except KeyError as error:
        raise InputError(f"{path.name} lacks {error}: give `quantize calibrate` again.") from error
    return SavedStatistics(inputs, ranges)
