"""safetensors files read one tensor at a time, behind a header check of our own.

Every header is validated before anything is allocated: cut files, lengths that lie, overlapping ranges, unknown types.
Tensors are read with plain reads, not mapped: a disk that fails then raises an error, where a mapped page would kill the
process. Knows no model.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.errors import InputError
from convert.folder.boundary import reading
from convert.folder.json_files import open_regular, parse_object, read_failure, read_up_to, show, show_value

DIMENSIONS = 8  # of a tensor, at most
HEADER_LIMIT = 100 * 2**20  # bytes, the limit of the safetensors library itself
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file, byte range [start, end) from the file's beginning, dtype, shape."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, header checked. Raises InputError naming the file and what is wrong with it."""
    name = show(path.name)
    if not path.exists():
        raise InputError(f"{name} does not exist in {show(str(path.parent))}. Copy it again.")
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            head = file.read(512)
            _refuse_other_content(name, head, size)
            (length,) = struct.unpack("<Q", head[:8])
            if length > size - 8 or length > HEADER_LIMIT:
                raise InputError(
                    f"{name} is {size:,} bytes but its header claims {length:,}: the file is cut short or damaged. "
                    "Copy it again and compare its sha256 with the source's."
                )
            file.seek(8)
            raw = read_up_to(file, length)
        except OSError as error:
            raise read_failure(path, error) from error
    with reading(f"the header of {path.name}"):
        table = parse_object(raw, f"header of {name}")
        table.pop("__metadata__", None)
        infos = {key: _entry(name, path, key, value, 8 + length) for key, value in table.items()}
        _check_ranges(name, list(infos.values()), 8 + length, size)
    return infos


def _refuse_other_content(name: str, head: bytes, size: int) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{name} is a Git LFS pointer ({size} bytes of text), not the weights. Run `git lfs pull` in its folder, or "
            "download the file itself."
        )
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(
            f"{name} is a web page, not weights: the download was answered by an error page. Download it again."
        )
    if size < 8:
        raise InputError(f"{name} is {size} bytes: too short for a safetensors header of 8. Copy it again.")


def _entry(file: str, path: Path, key: str, value: Any, base: int) -> TensorInfo:
    where = f"{file}: tensor {show(key)!r}"
    if not isinstance(value, dict):
        raise InputError(f"{where} has no description in the header. The file is damaged; copy it again.")
    dtype: Any = value.get("dtype")
    shape: Any = value.get("shape")
    offsets: Any = value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where} has the unknown dtype {show_value(dtype)}. Known: {', '.join(DTYPES)}.")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise InputError(
            f"{where} has shape {show_value(shape)}, offsets {show_value(offsets)}: expected whole numbers."
        )
    if len(shape) > DIMENSIONS or math.prod(max(1, extent) for extent in shape) >= 2**62:
        raise InputError(
            f"{where} has the shape {show_value(shape)}, which needs more bytes than any file holds."
        )
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise InputError(
            f"{where} has {offsets[1] - offsets[0]:,} bytes, but {dtype} of shape {show_value(shape)} needs {expected:,}. Copy it again."
        )
    return TensorInfo(key, path, DTYPES[dtype], tuple(shape), base + offsets[0], base + offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_ranges(name: str, infos: list[TensorInfo], base: int, size: int) -> None:
    at = base
    for info in sorted(infos, key=lambda info: (info.start, info.end)):
        if info.start != at:
            what = "overlaps the one before it" if info.start < at else "leaves a hole before it"
            raise InputError(
                f"{name}: tensor {show(info.name)!r} {what}. The file is damaged; copy it again."
            )
        at = info.end
    if at > size:
        raise InputError(
            f"{name} is {size:,} bytes but its header needs {at:,}: the file is cut short. Copy it again; `sha256sum` "
            "of the source should match."
        )
    if at < size:
        raise InputError(
            f"{name} has {size - at:,} bytes behind its last tensor: the file is damaged. Copy it again."
        )


def read_tensor(info: TensorInfo) -> Tensor:
    """The tensor, in its own dtype. Raises InputError when the file has become shorter, or cannot be read."""
    buffer = bytearray(info.end - info.start)
    if not buffer:
        return torch.empty(info.shape, dtype=info.dtype)
    view = memoryview(buffer)
    done = 0
    with open_regular(info.path) as file:
        try:
            file.seek(info.start)
            while done < len(buffer):
                count = file.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    break
                done += count
        except OSError as error:
            raise read_failure(info.path, error) from error
    if done < len(buffer):
        raise InputError(
            f"{show(info.path.name)} ends inside tensor {show(info.name)!r}: it was cut while it was being read. Start again."
        )
    return torch.frombuffer(buffer, dtype=info.dtype).view(info.shape)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises InputError with the count of NaN and Inf values, if any. One pass, nothing allocated when all is well."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    nans, infs = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    raise InputError(
        f"tensor {show(name)!r} holds {nans:,} NaN and {infs:,} infinite values of {tensor.numel():,}: the checkpoint is "
        "damaged or its training diverged. Copy it again or use another one."
    )
