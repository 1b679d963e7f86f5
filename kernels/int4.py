"""Integer group quantization: the one definition of scale, zero point, rounding and clamping.

N out features, K in features, G = K / group_size groups along K. Knows nothing of files, packing or models.
Formulas: s = fp16((max - min) / (2^b - 1)), z = clamp(round(-min / s), 0, 2^b - 1), q = clamp(round(w / s) + z, 0, 2^b - 1),
w^ = (q - z) * s, where min <= 0 <= max, round is half to even, and s is rounded to fp16 before it is used.
Symmetric: z = 2^(b-1) fixed, s = fp16(max(-min / (z + 1/2), max / (z - 1/2))), the finest scale at which no value of the range
is more than half a step from a code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_MIN = 2.0**-24  # smallest positive fp16: the scale of an all-zero group, so that no division is by zero
SCALE_MAX = 65504.0


@dataclass(frozen=True)
class Quantized:
    """A quantized weight. codes (N, K) uint8, scales (N, G) float16, zeros (N, G) uint8; w^ = (codes - zeros) * scales."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    bits: int = 4

    def __post_init__(self) -> None:
        rows, cols = self.codes.shape
        if cols % self.group_size:
            raise ValueError(
                f"K = {cols} is not a multiple of group_size {self.group_size}: pad K or choose a divisor."
            )
        shape = (rows, cols // self.group_size)
        for name, part in (("scales", self.scales), ("zeros", self.zeros)):
            if tuple(part.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(part.shape)}, expected (N, K / group_size) = {shape}."
                )
        if self.scales.dtype != torch.float16:
            raise ValueError(
                f"scales are {self.scales.dtype}, expected torch.float16: round them before packing."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w^ (N, K): exact in float32 (4-bit integer times 11-bit significand), rounded once for other dtypes."""
        return dequantize(self.codes, self.scales, self.zeros, self.group_size).to(dtype)

    def to(self, device: torch.device | str) -> "Quantized":
        return Quantized(
            self.codes.to(device), self.scales.to(device), self.zeros.to(device), self.group_size, self.bits
        )


def round_scale(scale: Tensor) -> Tensor:
    """Round to fp16 and clamp to its positive range; returned in the dtype of `scale`, exactly representable in fp16."""
    return scale.clamp(SCALE_MIN, SCALE_MAX).half().to(scale.dtype)


def middle_code(bits: int) -> int:
    """The zero point of a symmetric grid: 8 at 4 bits."""
    return 1 << (bits - 1)


def qparams(low: Tensor, high: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range [low, high], any shape, float. Returns both as float of the input's dtype."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        middle = middle_code(bits)
        scale = round_scale(torch.maximum(-low / (middle + 0.5), high / (middle - 0.5)))
        return scale, torch.full_like(scale, middle)
    scale = round_scale((high - low) / (2**bits - 1))
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    return scale, zero


def quantize_codes(weight: Tensor, scale: Tensor, zero: Tensor, group_size: int, bits: int) -> Tensor:
    """Codes (N, K), float, of weight (N, K) for scale and zero (N, G)."""
    rows, cols = weight.shape
    grouped = weight.view(rows, cols // group_size, group_size)
    codes = (grouped / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, 2**bits - 1)
    return codes.view(rows, cols)


def quantize(weight: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Quantized:
    """Round to nearest: weight (N, K) of any float dtype, K a multiple of group_size. Raises ValueError on a ragged K."""
    rows, cols = weight.shape
    if cols % group_size:
        raise ValueError(
            f"K = {cols} is not a multiple of group_size {group_size}: pad K or choose a divisor."
        )
    weight = weight.float()
    grouped = weight.view(rows, cols // group_size, group_size)
    scale, zero = qparams(grouped.amin(-1), grouped.amax(-1), bits, symmetric)
    codes = quantize_codes(weight, scale, zero, group_size, bits)
    return Quantized(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), group_size, bits)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """(codes - zeros) * scales, float32 (N, K), for codes (N, K), scales and zeros (N, G) of any dtype."""
    rows, cols = codes.shape
    centred = codes.view(rows, cols // group_size, group_size).float() - zeros.float()[..., None]
    return (centred * scales.float()[..., None]).view(rows, cols)


def bits_per_weight(bits: int, group_size: int, scale_bits: int = 16) -> float:
    """Storage per weight with a scale and a packed zero point for each group: 4.156 at 4 bits and groups of 128."""
    return bits + (scale_bits + bits) / group_size
