"""Weights stored as 8-bit values with scales beside them: FP8 as DeepSeek, Qwen and others publish it, and compressed-tensors' FP8
and int8. A weight is read as value * scale in float32, the format's own rule; (value - zero point) * scale where there is one.

N out features, K in features. weight (N, K) float8 or int8. The scale is one number, one a row (N, 1), or a grid of blocks
(ceil(N / b), ceil(K / c)); the last blocks of a grid may be cut short. Formats: quant_method "fp8" of transformers
(weight_scale_inv), compressed-tensors "float-quantized", "int-quantized" and "naive-quantized" (weight_scale).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convert.errors import InputError
from convert.folder.json_files import show

SCALES = ("weight_scale_inv", "weight_scale")
# tensors beside such a weight that say how activations or the KV cache were quantized: no part of the weight
NOT_OF_WEIGHTS = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "input_zero_point")
VALUES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_METHODS = ("float-quantized", "int-quantized", "naive-quantized")


@dataclass(frozen=True)
class ScaledFormat:
    """`label` names the format in notes; `block`: rows and columns that share a scale of a grid, None where the grid shows it."""

    label: str
    block: tuple[int, int] | None = None

    def scale_of(self, module: str, names: Mapping[str, object]) -> str | None:
        """The tensor that scales this module's weight, None where the weight is an ordinary float."""
        return next((f"{module}.{part}" for part in SCALES if f"{module}.{part}" in names), None)

    def dequantize(self, module: str, values: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """The weight (N, K) float32. Raises InputError where the scales do not cover it."""
        if values.dtype not in VALUES:
            raise InputError(
                f"{show(module)} has scales, but its weight is {str(values.dtype).removeprefix('torch.')}: expected "
                "float8_e4m3fn, float8_e5m2 or int8. Copy the checkpoint again."
            )
        wide = values.float()
        if zero is not None:
            wide = wide - self._spread(module, zero.float(), values.shape)
        return wide * self._spread(module, scale.float(), values.shape)

    def _spread(self, module: str, grid: Tensor, shape: torch.Size) -> Tensor:
        """A grid of scales for every element, or one that broadcasts over (N, K)."""
        rows, cols = shape
        if grid.numel() == 1:
            return grid.reshape(1, 1)
        grid = grid[:, None] if grid.dim() == 1 else grid
        if grid.dim() != 2:
            raise InputError(
                f"{show(module)}: scales of shape {list(grid.shape)} fit no weight of {list(shape)}."
            )
        if tuple(grid.shape) == (rows, 1):
            return grid
        high, wide = self.block or (-(-rows // grid.shape[0]), -(-cols // grid.shape[1]))
        if grid.shape[0] == rows:
            high = 1  # a scale for each row and group of columns
        if (-(-rows // high), -(-cols // wide)) != tuple(grid.shape):
            raise InputError(
                f"{show(module)}: scales of shape {list(grid.shape)} do not cover a weight of {list(shape)} in blocks of "
                f"{high} x {wide}. Copy the checkpoint and its config.json again."
            )
        return grid.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :cols]


def scaled_format(raw: Mapping[str, Any]) -> ScaledFormat | None:
    """The format that a parsed config.json states, None where it states none of these. Raises InputError for one not read."""
    quant = raw.get("quantization_config")
    if not isinstance(quant, dict):
        return None
    if quant.get("quant_method") == "fp8":
        return _fp8(quant)
    if quant.get("quant_method") == "compressed-tensors" and quant.get("format") in _METHODS:
        return _compressed(quant)
    return None


def _fp8(quant: Mapping[str, Any]) -> ScaledFormat:
    block = quant.get("weight_block_size")
    if block is None:
        return ScaledFormat("FP8 with a scale a tensor")
    return ScaledFormat(f"FP8 in blocks of {show(str(block))}", _block(block, "weight_block_size"))


def _compressed(quant: Mapping[str, Any]) -> ScaledFormat:
    groups = quant.get("config_groups")
    entries = list(groups.values()) if isinstance(groups, dict) else []
    weights = [entry.get("weights") for entry in entries if isinstance(entry, dict)]
    found: set[tuple[str, tuple[int, int] | None]] = set()
    for entry in weights:
        if (
            not isinstance(entry, dict)
            or entry.get("num_bits") != 8
            or entry.get("type") not in ("int", "float")
        ):
            raise InputError(
                f"config.json: quantization_config.config_groups describes weights of {show(repr(entry))[:120]}: of "
                f"{show(str(quant.get('format')))}, 8-bit int and float are read."
            )
        name = "FP8" if entry["type"] == "float" else "int8"
        block = entry.get("block_structure") if entry.get("strategy") == "block" else None
        found.add((name, None if block is None else _block(block, "block_structure")))
    if len(found) != 1:
        raise InputError(
            f"config.json: quantization_config.config_groups holds {len(found)} kinds of weights; one is read."
        )
    name, block = found.pop()
    return ScaledFormat(f"compressed-tensors {name}", block)


def _block(value: Any, key: str) -> tuple[int, int]:
    if isinstance(value, str):  # "128x128", as older releases wrote it
        value = [int(part) for part in value.split("x") if part.isdigit()]
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
        raise InputError(
            f"config.json: quantization_config.{key} is {show(repr(value))}, expected two whole numbers above 0."
        )
    return sizes[0], sizes[1]
