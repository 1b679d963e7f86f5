"""GPTQ: qweight int32 (K / 8, N), qzeros int32 (K / g, N / 8), scales float16 (K / g, N), g_idx int32 (K): k // g.

Nibble i of a word of qweight is row 8r + i, of qzeros column 8w + i. checkpoint_format "gptq" (v1) holds z - 1, taken off the
whole word; "gptq_v2" holds z. We write v1 for the symmetric grid, which every reader takes, and v2 otherwise, because v1
borrows across nibbles where z is 0. Format: github.com/ModelCloud/GPTQModel, utils/model.py.
"""

import re
from collections.abc import Iterable, Mapping
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
from kernels.packing import SEQUENTIAL_ORDER, pack_columns, unpack_columns

ONES = 0x11111111  # one in every nibble
SKIP = "-:"  # begins a rule of `dynamic` that leaves modules float


class GptqLayout:
    """See `convert.linear_layouts.base.LinearLayout`."""

    method: Method = "gptq"
    marker = "qweight"

    def expected(self, shape: tuple[int, int], fmt: QuantFormat) -> Expected:
        check_sizes(shape, fmt.group_size)
        rows, cols = shape
        groups = cols // fmt.group_size
        return {
            "qweight": ((torch.int32,), (cols // 8, rows)),
            "qzeros": ((torch.int32,), (groups, rows // 8)),
            "scales": (SCALE_DTYPES, (groups, rows)),
            "g_idx": ((torch.int32,), (cols,)),
        }

    def write(self, linear: Stored, fmt: QuantFormat) -> dict[str, Tensor]:
        zeros = pack_columns(linear["zeros"], SEQUENTIAL_ORDER)
        return {
            "qweight": words_by_input(linear["words"]).t().contiguous(),
            "qzeros": zeros - ONES * fmt.zero_offset,
            "scales": linear["scales"].contiguous(),
            "g_idx": torch.arange(linear["words"].shape[0], dtype=torch.int32) // fmt.group_size,
        }

    def read(self, module: str, parts: Mapping[str, Tensor], fmt: QuantFormat) -> Stored:
        order = parts["g_idx"]
        if not torch.equal(order, torch.arange(len(order), dtype=order.dtype) // fmt.group_size):
            raise InputError(
                f"{show(module)}: g_idx puts the columns in another order (act-order), which is not read. "
                "Start from the float checkpoint."
            )
        zeros = parts["qzeros"] + ONES * fmt.zero_offset
        return {
            "words": words_by_output(parts["qweight"].t().contiguous()),
            "scales": half_scales(module, parts["scales"]),
            "zeros": unpack_columns(zeros, SEQUENTIAL_ORDER),
        }

    def parse(self, quant: Mapping[str, Any]) -> QuantFormat:
        check_bits(quant.get("bits"), "quantization_config.bits")
        group = check_group(quant.get("group_size"), "quantization_config")
        if quant.get("desc_act", False) is not False:
            raise InputError(
                "config.json: quantization_config.desc_act is not false: columns in another order (act-order) are not read. "
                "Start from the float checkpoint."
            )
        version = quant.get("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise InputError(
                f"config.json: quantization_config.checkpoint_format is {show_value(version)}, expected gptq or gptq_v2."
            )
        symmetric = quant.get("sym", True)
        if not isinstance(symmetric, bool):
            raise InputError(
                f"config.json: quantization_config.sym is {show_value(symmetric)}, expected true or false."
            )
        dynamic = quant.get("dynamic") or {}
        if not isinstance(dynamic, dict) or any(not str(rule).startswith(SKIP) for rule in dynamic):
            raise InputError(
                "config.json: quantization_config.dynamic gives modules settings of their own, which is not read."
            )
        return QuantFormat(4, group, _names(dynamic), "gptq", symmetric, 1 if version == "gptq" else 0)

    def document(self, fmt: QuantFormat, skipped: list[str]) -> dict[str, Any]:
        quant: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": fmt.group_size,
            "sym": fmt.symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq" if fmt.zero_offset else "gptq_v2",
            "lm_head": False,
            "pack_dtype": "int32",
        }
        if inside := [name for name in skipped if "." in name]:  # the head is float by `lm_head`
            quant["dynamic"] = {_rule(name): {} for name in inside}
        return {"quantization_config": quant}


def _rule(name: str) -> str:
    """The rule by which GPTQModel and vLLM leave a module float: a pattern that is matched from the start."""
    return f"{SKIP}.*{re.escape(name)}$"


def _names(rules: Iterable[str]) -> tuple[str, ...]:
    """Inverse of `_rule`; patterns of other writers stay as they are."""
    plain = (rule.removeprefix(SKIP).removeprefix(".*").removesuffix("$") for rule in rules)
    return tuple(re.sub(r"\\(.)", r"\1", name) for name in plain)
