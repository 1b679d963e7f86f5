"""A GGUF file opened behind checks of our own: magic, version, counts, and that it holds every byte its header names."""

import math
from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.folder.boundary import reading
from convert.folder.json_files import show
from convert.gguf.header import check_header


def open_gguf(path: Path) -> Any:
    """A gguf.GGUFReader over the file. Raises InputError when it is no GGUF file, cut, or its counts lie."""
    size = path.stat().st_size if path.is_file() else 0
    tensors, pairs = check_header(path)
    from gguf import GGUFReader

    class CheckedReader(GGUFReader):  # type: ignore[misc]
        """Compares the ends of all tensors with the size of the file before it makes views of them."""

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            _check_ends(path, size, int(start_offs), fields)
            super()._build_tensors(start_offs, fields)

    with reading(f"{path.name}, {size:,} bytes with {pairs:,} metadata keys and {tensors:,} tensors,"):
        return CheckedReader(path)


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
