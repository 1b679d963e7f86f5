"""A GGUF file opened behind checks of our own: magic, version, counts, and that it holds every byte its header names."""

import math
import struct
from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.folder.json_files import show


def open_gguf(path: Path) -> Any:
    """A gguf.GGUFReader over the file. Raises InputError when it is no GGUF file, cut, or its counts lie."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise InputError(f"{show(str(path))} cannot be read: {error.strerror}.") from error
    if head.startswith(b"version "):
        raise InputError(f"{show(path.name)} is a Git LFS pointer, not the model. Run `git lfs pull`.")
    if len(head) < 24 or head[:4] != b"GGUF":
        raise InputError(
            f"{show(path.name)} does not begin as a GGUF file ({size:,} bytes). Download it again."
        )
    version, tensors, pairs = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3) or tensors > 2**20 or pairs > 2**16:
        raise InputError(
            f"{show(path.name)}: GGUF version {version} with {tensors:,} tensors and {pairs:,} metadata keys; expected version 2 or "
            "3 and plausible counts. The file is damaged or big-endian."
        )
    from gguf import GGUFReader

    class CheckedReader(GGUFReader):  # type: ignore[misc]
        """Compares the ends of all tensors with the size of the file before it makes views of them."""

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            _check_ends(path, size, int(start_offs), fields)
            super()._build_tensors(start_offs, fields)

    try:
        reader = CheckedReader(path)
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        MemoryError,
        UnicodeDecodeError,
    ) as error:
        raise InputError(
            f"{show(path.name)} is {size:,} bytes, in which its header of {pairs:,} metadata keys and {tensors:,} tensors has no "
            "sound end: the file is cut short or damaged. Download it again and compare its sha256."
        ) from error
    return reader


def _check_ends(path: Path, size: int, start: int, fields: list[Any]) -> None:
    """`fields` are the header's entries of tensors, whose data begin at byte `start`. Raises InputError where one ends behind the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    ends: dict[str, int] = {}
    for field in fields:
        _, raw_name, _, dims, kind, offset = field.parts
        name = bytes(raw_name).decode()
        if name in ends:
            raise InputError(f"{show(path.name)} has two tensors {show(name)!r}. Use another file.")
        try:
            block, width = GGML_QUANT_SIZES[GGMLQuantizationType(int(kind[0]))]
        except ValueError as error:
            raise InputError(
                f"{show(path.name)}: tensor {show(name)!r} has the type {int(kind[0])}, which the gguf package does not know. "
                "Use another file, or a later release of that package."
            ) from error
        count = math.prod(int(extent) for extent in dims)
        ends[name] = start + int(offset[0]) + count * width // block
    first = next((name for name, end in ends.items() if end > size), None)
    if first is not None:
        raise InputError(
            f"{show(path.name)} is {size:,} bytes but its header needs {max(ends.values()):,}: the file is cut short, and tensor "
            f"{show(first)!r} is the first that it does not hold. Download it again; `sha256sum` of the source should match."
        )
