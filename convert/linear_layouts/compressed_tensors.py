"""compressed-tensors `pack-quantized`, int4: eight codes along K in a word, zero points packed along N.

weight_packed int32 (N, K / 8), weight_scale float16 (N, K / g), weight_zero_point int32 (N / 8, K / g) where the grid is
asymmetric, weight_shape int64 (2): N, K. Nibble i of a word, bits 4i .. 4i + 3, is column (or row) 8w + i; a stored code is
the signed value plus 8, which is our code. Format: github.com/vllm-project/compressed-tensors, compressors/pack_quantized.
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
    check_names,
    check_sizes,
    eights,
    half_scales,
    words_by_input,
    words_by_output,
)
from kernels.packing import SEQUENTIAL_ORDER, pack_columns, unpack_columns

PACKED = "pack-quantized"


class CompressedTensorsLayout:
    """See `convert.linear_layouts.base.LinearLayout`."""

    method: Method = "compressed-tensors"
    marker = "weight_packed"

    def expected(self, shape: tuple[int, int], fmt: QuantFormat) -> Expected:
        check_sizes(shape, fmt.group_size)
        rows, cols = shape
        groups = cols // fmt.group_size
        table: Expected = {
            "weight_packed": ((torch.int32,), (rows, cols // 8)),
            "weight_scale": (SCALE_DTYPES, (rows, groups)),
            "weight_shape": ((torch.int64, torch.int32), (2,)),
        }
        if not fmt.symmetric:
            table["weight_zero_point"] = ((torch.int32,), (rows // 8, groups))
        return table

    def write(self, linear: Stored, fmt: QuantFormat) -> dict[str, Tensor]:
        packed = words_by_input(linear["words"])
        tensors = {
            "weight_packed": packed,
            "weight_scale": linear["scales"].t().contiguous(),
            "weight_shape": torch.tensor([packed.shape[0], packed.shape[1] * 8], dtype=torch.int64),
        }
        if not fmt.symmetric:
            words = pack_columns(linear["zeros"], SEQUENTIAL_ORDER)  # (G, N // 8)
            tensors["weight_zero_point"] = words.t().contiguous()
        return tensors

    def read(self, module: str, parts: Mapping[str, Tensor], fmt: QuantFormat) -> Stored:
        packed = parts["weight_packed"]
        stated, shape = parts["weight_shape"].tolist(), [packed.shape[0], packed.shape[1] * 8]
        if stated != shape:
            raise InputError(
                f"{show(module)}: weight_shape says {stated}, weight_packed holds {shape}. Copy the checkpoint again."
            )
        scales = half_scales(module, parts["weight_scale"]).t().contiguous()
        if fmt.symmetric:
            zeros = eights(scales.shape)
        else:
            zeros = unpack_columns(parts["weight_zero_point"].t(), SEQUENTIAL_ORDER)
        return {"words": words_by_output(packed), "scales": scales, "zeros": zeros}

    def parse(self, quant: Mapping[str, Any]) -> QuantFormat:
        groups = quant.get("config_groups")
        if quant.get("format") not in (PACKED, None) or not isinstance(groups, dict) or len(groups) != 1:
            raise InputError(
                f"config.json: compressed-tensors of the format {show_value(quant.get('format'))} with "
                f"{len(groups) if isinstance(groups, dict) else 'no'} config_groups: only {PACKED} with one group is read. "
                "Start from the original float checkpoint."
            )
        (name, group), where = next(iter(groups.items())), "quantization_config.config_groups"
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or group.get("format", PACKED) not in (PACKED, None):
            raise InputError(f"config.json: {where}.{show(name)} describes no {PACKED} weights.")
        if group.get("input_activations") or group.get("output_activations"):
            raise InputError(
                f"config.json: {where}.{show(name)} quantizes activations too, which is not read."
            )
        where = f"{where}.{show(name)}.weights"
        check_bits(weights.get("num_bits"), where + ".num_bits")
        if (
            weights.get("type", "int") != "int"
            or weights.get("strategy") != "group"
            or weights.get("dynamic")
        ):
            raise InputError(f"config.json: {where} is not int with strategy group: not read.")
        if weights.get("actorder") in ("group", "dynamic", True):
            raise InputError(f"config.json: {where}.actorder: columns in another order are not read.")
        symmetric = weights.get("symmetric", True)
        if not isinstance(symmetric, bool):
            raise InputError(
                f"config.json: {where}.symmetric is {show_value(symmetric)}, expected true or false."
            )
        size = check_group(weights.get("group_size"), where)
        skipped = check_names(quant.get("ignore"), "quantization_config.ignore")
        return QuantFormat(4, size, skipped, "compressed-tensors", symmetric)

    def document(self, fmt: QuantFormat, skipped: list[str]) -> dict[str, Any]:
        weights = {
            "num_bits": 4,
            "type": "int",
            "strategy": "group",
            "group_size": fmt.group_size,
            "symmetric": fmt.symmetric,
            "dynamic": False,
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": PACKED,  # LMDeploy reads it here
        }
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": PACKED,
                "quantization_status": "compressed",
                "config_groups": {"group_0": group},  # LMDeploy reads this key alone
                "ignore": skipped,
                "kv_cache_scheme": None,
            }
        }
