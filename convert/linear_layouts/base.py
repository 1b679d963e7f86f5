"""What every layout of a packed linear offers, and the moves of words that several of them share.

N out features, K in features, g group size, G = K / g. A packed linear in stored form: `words` (K, N // 8) int32 in
sequential order, `scales` (G, N) float16, `zeros` (G, N) uint8.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from convert.checkpoint import Stored
from convert.config import Method, QuantFormat
from convert.errors import InputError
from convert.folder.json_files import show, show_value
from kernels.packing import SEQUENTIAL_ORDER, pack_columns, unpack_columns

GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# suffix -> (allowed dtypes, shape) of the tensors of one packed linear
Expected = dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]


class LinearLayout(Protocol):
    """One format of packed linears. `marker` is the suffix of the tensor that shows a linear to be packed."""

    method: Method
    marker: str

    def expected(self, shape: tuple[int, int], fmt: QuantFormat) -> Expected:
        """The tensors of a linear of shape (N, K). Raises InputError where N or K cannot be packed."""
        ...

    def write(self, linear: Stored, fmt: QuantFormat) -> dict[str, Tensor]:
        """A packed linear in stored form -> suffix -> tensor; the bias is not part of it."""
        ...

    def read(self, module: str, parts: Mapping[str, Tensor], fmt: QuantFormat) -> Stored:
        """Inverse of `write`. Raises InputError naming the module where the values do not fit the stored form."""
        ...

    def parse(self, quant: Mapping[str, Any]) -> QuantFormat:
        """The entry of config.json -> QuantFormat. Raises InputError naming the key that is not as expected."""
        ...

    def document(self, fmt: QuantFormat, skipped: list[str]) -> dict[str, Any]:
        """Entries of config.json. `skipped` are the names of the linears that stay float."""
        ...


def check_sizes(shape: tuple[int, int], group_size: int) -> None:
    """Raises InputError where N is no multiple of 8 or K none of the group."""
    rows, cols = shape
    if rows % 8 or cols % group_size:
        raise InputError(
            f"a packed linear of shape {shape} needs N a multiple of 8 and K a multiple of group_size {group_size}: "
            "config.json does not belong to these weights."
        )


def check_group(value: Any, where: str) -> int:
    """A group size of a config.json. Raises InputError for any other value."""
    if isinstance(value, bool) or value not in GROUP_SIZES:
        raise InputError(
            f"config.json: {where}.group_size is {show_value(value)}, expected one of {GROUP_SIZES}."
        )
    return int(value)


def check_bits(value: Any, where: str) -> None:
    """Raises InputError unless the value is 4."""
    if value != 4 or isinstance(value, bool):
        raise InputError(f"config.json: {where} is {show_value(value)}, expected 4.")


def check_names(value: Any, where: str) -> tuple[str, ...]:
    """A list of names in a config.json, absent or null: none."""
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"config.json: {where} must be a list of names.")
    return tuple(names)


def words_by_input(words: Tensor) -> Tensor:
    """Sequential words (K, N // 8), eight outputs each -> (N, K // 8), eight inputs each."""
    return pack_columns(unpack_columns(words, SEQUENTIAL_ORDER).t(), SEQUENTIAL_ORDER)


def words_by_output(words: Tensor) -> Tensor:
    """Inverse of `words_by_input`: (N, K // 8) -> (K, N // 8)."""
    return pack_columns(unpack_columns(words, SEQUENTIAL_ORDER).t(), SEQUENTIAL_ORDER)


def half_scales(module: str, scales: Tensor) -> Tensor:
    """Scales as float16. Raises InputError where that would change one."""
    half = scales.half()
    if half.dtype != scales.dtype and not torch.equal(half.to(scales.dtype), scales):
        changed = int((half.to(scales.dtype) != scales).sum())
        raise InputError(
            f"{show(module)}: {changed:,} of {scales.numel():,} scales are {str(scales.dtype).removeprefix('torch.')} values that "
            "float16 does not hold, so reading them would change the weights. Start from the float checkpoint."
        )
    return half


def eights(shape: torch.Size) -> Tensor:
    """The zero points of a symmetric linear."""
    return torch.full(shape, 8, dtype=torch.uint8)


def is_symmetric(zeros: Tensor) -> bool:
    """Whether every zero point is 8, the middle of the codes."""
    return bool((zeros == 8).all())
