"""The layouts by name, and the one that a config.json states."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.config import Method, QuantFormat
from convert.errors import InputError
from convert.folder.json_files import show, show_value
from convert.linear_layouts.awq import AwqLayout
from convert.linear_layouts.base import LinearLayout
from convert.linear_layouts.compressed_tensors import CompressedTensorsLayout
from convert.linear_layouts.gptq import GptqLayout
from convert.linear_layouts.mlx import MlxLayout

LAYOUTS: dict[Method, LinearLayout] = {
    layout.method: layout for layout in (AwqLayout(), CompressedTensorsLayout(), GptqLayout(), MlxLayout())
}


def stated_layout(quant: Mapping[str, Any]) -> LinearLayout:
    """The layout of a `quantization_config`. Raises InputError, by name, for a method that is not read."""
    method = quant.get("quant_method")
    if method is None and "group_size" in quant and "bits" in quant:
        return LAYOUTS["mlx"]  # MLX states no method
    for layout in LAYOUTS.values():
        if layout.method == method:
            return layout
    raise InputError(
        f"config.json: the checkpoint is quantized with {show(str(method))!r}; only {', '.join(LAYOUTS)} with 4 bits are read. "
        "Start from the original float checkpoint."
    )


def parse_quantization(raw: Mapping[str, Any], true_bits: int | None = None) -> QuantFormat | None:
    """`quantization_config` of a config.json -> QuantFormat, None where absent.

    Args:
        true_bits: bits that the manifest declares, for int3 and int2 codes held in nibbles.

    Raises InputError naming what is not read.
    """
    quant = raw.get("quantization_config", raw.get("quantization"))
    if quant is None:
        return None
    if not isinstance(quant, dict):
        raise InputError(f"config.json: quantization_config is {show_value(quant)}, expected an object.")
    fmt = stated_layout(quant).parse(quant)
    if true_bits is None:
        return fmt
    if true_bits not in (2, 3, 4):
        raise InputError(f"tmq/manifest.json: bits is {show_value(true_bits)}, expected 2, 3 or 4.")
    return dataclasses.replace(fmt, bits=true_bits)
