"""AWQ "gemm": qweight int32 (K, N / 8), qzeros int32 (K / g, N / 8), scales float16 (K / g, N).

Nibble order of `kernels.packing.AWQ_ORDER`, zeros without offset. Format: github.com/casper-hansen/AutoAWQ, WQLinear_GEMM.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint import Stored
from convert.config import Method, QuantFormat
from convert.errors import InputError
from convert.folder.json_files import show
from convert.linear_layouts.base import Expected, check_bits, check_group, check_names, check_sizes
from kernels.packing import AWQ_ORDER, awq_to_sequential_, pack_columns, sequential_to_awq_, unpack_columns


class AwqLayout:
    """See `convert.linear_layouts.base.LinearLayout`."""

    method: Method = "awq"
    marker = "qweight"

    def expected(self, shape: tuple[int, int], fmt: QuantFormat) -> Expected:
        check_sizes(shape, fmt.group_size)
        rows, cols = shape
        groups = cols // fmt.group_size
        return {
            "qweight": ((torch.int32,), (cols, rows // 8)),
            "qzeros": ((torch.int32,), (groups, rows // 8)),
            "scales": ((torch.float16,), (groups, rows)),
        }

    def write(self, linear: Stored, fmt: QuantFormat) -> dict[str, Tensor]:
        words = linear["words"].clone(memory_format=torch.contiguous_format)
        return {
            "qweight": sequential_to_awq_(words),
            "qzeros": pack_columns(linear["zeros"], AWQ_ORDER),
            "scales": linear["scales"].contiguous(),
        }

    def read(self, module: str, parts: Mapping[str, Tensor], fmt: QuantFormat) -> Stored:
        words = awq_to_sequential_(parts["qweight"])
        zeros = unpack_columns(parts["qzeros"], AWQ_ORDER)
        return {"words": words, "scales": parts["scales"], "zeros": zeros}

    def parse(self, quant: Mapping[str, Any]) -> QuantFormat:
        version = quant.get("version", "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise InputError(
                f"config.json: the checkpoint is quantized with {show(f'awq ({version!s})')!r}; only version gemm of AWQ is read. "
                "Start from the original float checkpoint."
            )
        check_bits(quant.get("bits", quant.get("w_bit")), "quantization_config.bits")
        group = check_group(quant.get("group_size", quant.get("q_group_size")), "quantization_config")
        if quant.get("zero_point", True) is not True:
            raise InputError(
                "config.json: quantization_config.zero_point is not true: AWQ without zero points is not read."
            )
        skipped = check_names(
            quant.get("modules_to_not_convert"), "quantization_config.modules_to_not_convert"
        )
        return QuantFormat(4, group, skipped)

    def document(self, fmt: QuantFormat, skipped: list[str]) -> dict[str, Any]:
        # zero_point stays true for a symmetric grid: loaders that see false take kernels that leave the zeros unset
        return {
            "quantization_config": {
                "quant_method": "awq",
                "version": "gemm",
                "bits": 4,
                "group_size": fmt.group_size,
                "zero_point": True,
                "modules_to_not_convert": skipped,
            }
        }
