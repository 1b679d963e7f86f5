"""MLX affine: weight uint32 (N, K / 8), scales and biases float16 (N, K / g), w = code * scale + bias, bias = -z * scale.

Nibble i of a word, bits 4i .. 4i + 3, is column 8w + i. The bias is rounded to float16, so that MLX computes with zero points
that are off by at most 2^-11 of their size; reading finds the integers again. Format: github.com/ml-explore/mlx, affine mode.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint import Stored
from convert.config import Method, QuantFormat
from convert.errors import InputError
from convert.folder.json_files import show, show_value
from convert.linear_layouts.base import (
    SCALE_DTYPES,
    Expected,
    check_bits,
    check_group,
    check_sizes,
    half_scales,
    words_by_input,
    words_by_output,
)

LARGEST_REST = 2.0**-6  # of -bias / scale from a whole number: float16 rounds 15 by at most 2^-8


def rounded_offsets(scales: Tensor, zeros: Tensor) -> Tensor:
    """-z * s rounded to float16, any shape. Raises InputError where float16 cannot hold one."""
    offsets = (-zeros.float() * scales.float()).half()
    if not bool(torch.isfinite(offsets).all()):
        raise InputError(
            f"{int((~torch.isfinite(offsets)).sum()):,} offsets -z * s lie beyond float16 (65504): this format cannot hold them. "
            "Quantize with --symmetric, or choose compressed-tensors."
        )
    return offsets


def whole_zeros(module: str, scales: Tensor, offsets: Tensor) -> Tensor:
    """Inverse of `rounded_offsets`: the zero points, uint8. Raises InputError where they are no integers from 0 to 15."""
    if not bool((scales > 0).all()):
        raise InputError(f"{show(module)}: {int((scales <= 0).sum()):,} scales are not above 0: not read.")
    exact = -offsets.float() / scales.float()
    zeros = exact.round()
    # below the smallest normal number float16 has fewer digits: a scale of one unit there still gives whole multiples
    unfit = ((exact - zeros).abs() > LARGEST_REST) | (zeros < 0) | (zeros > 15)
    if bool(unfit.any()):
        raise InputError(
            f"{show(module)}: {int(unfit.sum()):,} of {unfit.numel():,} groups have an offset that is no whole multiple, from 0 to 15, "
            "of the scale: these weights are no int4 codes with zero points. Start from the float checkpoint."
        )
    return zeros.to(torch.uint8)


class MlxLayout:
    """See `convert.linear_layouts.base.LinearLayout`."""

    method: Method = "mlx"
    marker = "scales"

    def expected(self, shape: tuple[int, int], fmt: QuantFormat) -> Expected:
        check_sizes(shape, fmt.group_size)
        rows, cols = shape
        groups = cols // fmt.group_size
        return {
            "weight": ((torch.uint32,), (rows, cols // 8)),
            "scales": (SCALE_DTYPES, (rows, groups)),
            "biases": (SCALE_DTYPES, (rows, groups)),
        }

    def write(self, linear: Stored, fmt: QuantFormat) -> dict[str, Tensor]:
        scales, zeros = linear["scales"].t().contiguous(), linear["zeros"].t().contiguous()
        return {
            "weight": words_by_input(linear["words"]).view(torch.uint32),
            "scales": scales,
            "biases": rounded_offsets(scales, zeros),
        }

    def read(self, module: str, parts: Mapping[str, Tensor], fmt: QuantFormat) -> Stored:
        scales = half_scales(module, parts["scales"])
        return {
            "words": words_by_output(parts["weight"].view(torch.int32)),
            "scales": scales.t().contiguous(),
            "zeros": whole_zeros(module, scales, parts["biases"]).t().contiguous(),
        }

    def parse(self, quant: Mapping[str, Any]) -> QuantFormat:
        check_bits(quant.get("bits"), "quantization.bits")
        if quant.get("mode", "affine") != "affine":
            raise InputError(
                f"config.json: quantization.mode is {show_value(quant['mode'])}, expected affine."
            )
        own = [name for name, value in quant.items() if isinstance(value, dict)]
        if own:
            raise InputError(
                f"config.json: quantization gives {len(own)} modules settings of their own, the first is {show(own[0])!r}: not read."
            )
        skipped = tuple(name for name, value in quant.items() if value is False)
        return QuantFormat(4, check_group(quant.get("group_size"), "quantization"), skipped, "mlx")

    def document(self, fmt: QuantFormat, skipped: list[str]) -> dict[str, Any]:
        # which linears are packed shows in the files: those that have scales
        settings = {"group_size": fmt.group_size, "bits": 4, "mode": "affine"}
        return {"quantization": settings, "quantization_config": dict(settings)}
