"""The two states of a decoder block: `FloatBlock` before quantization, `QuantizedBlock` after it, as the packed checkpoint holds it.

N out features, K in features. Both are `BlockWeights`, so that the engine runs either.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, LinearWeights
from convert.errors import InputError
from convert.families.norms import storable_norm
from kernels.int4 import Quantized


@dataclass(frozen=True)
class FloatLinear(LinearWeights):
    """A linear that is not quantized: weight (N, K) of a float dtype."""

    weight: Tensor
    bias: Tensor | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "FloatLinear":
        """On the device and, where one is given, in the dtype; the bias too."""
        bias = None if self.bias is None else self.bias.to(device=device, dtype=dtype)
        return FloatLinear(self.weight.to(device=device, dtype=dtype), bias)


@dataclass(frozen=True)
class FloatBlock(BlockWeights):
    """A block of which no linear is quantized."""

    linears: Mapping[str, FloatLinear]

    @staticmethod
    def of(block: BlockWeights) -> "FloatBlock":
        """The same block with its state known. Raises InputError where a linear is quantized already."""
        linears = {}
        for role, part in block.linears.items():
            if isinstance(part.weight, Quantized):
                raise InputError(
                    f"Block {block.index}, {role} is quantized already: start from the float checkpoint."
                )
            linears[role] = FloatLinear(part.weight, part.bias)
        return FloatBlock(block.index, linears, block.norms, block.vectors, block.norm_offset)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "FloatBlock":
        """On the device and, where one is given, in the dtype; norms too. Other vectors keep their dtype."""
        linears = {role: part.to(device, dtype) for role, part in self.linears.items()}
        norms = {role: norm.to(device=device, dtype=dtype) for role, norm in self.norms.items()}
        vectors = {role: vector.to(device) for role, vector in self.vectors.items()}
        return FloatBlock(self.index, linears, norms, vectors, self.norm_offset)


@dataclass(frozen=True)
class QuantizedBlock(BlockWeights):
    """A block as the packed checkpoint holds it: some linears Quantized, all else float16.

    Norms that files hold less an offset are float32 here, each the value that such a file gives back.
    """

    @staticmethod
    def of(block: BlockWeights) -> "QuantizedBlock":
        """Norms, biases and the linears that stay float, in float16."""
        linears = {
            role: LinearWeights(
                part.weight if isinstance(part.weight, Quantized) else part.weight.half(),
                None if part.bias is None else part.bias.half(),
            )
            for role, part in block.linears.items()
        }
        norms = {role: storable_norm(norm, block.norm_offset) for role, norm in block.norms.items()}
        return QuantizedBlock(block.index, linears, norms, block.vectors, block.norm_offset)

    @property
    def quantized(self) -> dict[str, Quantized]:
        """Role -> weight of the linears that are integers."""
        weights = {role: part.weight for role, part in self.linears.items()}
        return {role: weight for role, weight in weights.items() if isinstance(weight, Quantized)}

    @property
    def floats(self) -> dict[str, Tensor]:
        """Role -> weight (N, K) of the linears that stay float."""
        weights = {role: part.weight for role, part in self.linears.items()}
        return {role: weight for role, weight in weights.items() if not isinstance(weight, Quantized)}

    def floats_on(self, device: torch.device | str) -> "QuantizedBlock":
        """The block with its biases, its norms and the linears that are not quantized on the device."""
        linears = {
            role: replace(part, bias=None if part.bias is None else part.bias.to(device))
            for role, part in self.linears.items()
        }
        for role, weight in self.floats.items():
            linears[role] = replace(linears[role], weight=weight.to(device))
        norms = {role: norm.to(device) for role, norm in self.norms.items()}
        vectors = {role: vector.to(device) for role, vector in self.vectors.items()}
        return replace(self, linears=linears, norms=norms, vectors=vectors)
