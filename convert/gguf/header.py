"""The header of a GGUF file walked once before the gguf package reads it: every length and count is held against the file's size.

The package makes several Python objects of each element it reads, so a header of a few bytes could ask for any amount of memory.
"""

import math
import struct
from io import BufferedReader
from pathlib import Path

from convert.errors import InputError
from convert.folder.json_files import open_regular, read_failure, show

MAGIC = b"GGUF"
WIDTHS = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    4: 4,
    5: 4,
    6: 4,
    7: 1,
    10: 8,
    11: 8,
    12: 8,
}  # bytes of a value, by its type
STRING, ARRAY = 8, 9
MOST_ELEMENTS = (
    2**23
)  # of all arrays together; a vocabulary of a million with its merges, scores and types has half of that
MOST_PAIRS, MOST_TENSORS = 2**12, 2**17
NAME_LIMIT = 2**16 - 1  # bytes of a key or a tensor's name
STRING_LIMIT = 2**22  # bytes of a value: a chat template or a licence


def check_header(path: Path) -> tuple[int, int]:
    """(tensors, metadata keys) of the file. Raises InputError where it is no GGUF file, cut, or claims what it cannot hold."""
    with open_regular(path) as raw:
        try:
            size = path.stat().st_size
            return _Walk(path, BufferedReader(raw), size).walk()  # type: ignore[arg-type]
        except OSError as error:
            raise read_failure(path, error) from error


class _Walk:
    def __init__(self, path: Path, file: BufferedReader, size: int) -> None:
        self.name, self.file, self.size = show(path.name), file, size
        self.at = self.elements = self.tensors = self.pairs = 0

    def walk(self) -> tuple[int, int]:
        tensors, pairs = self.tensors, self.pairs = self._counts()
        for _ in range(pairs):
            self._text("a metadata key", NAME_LIMIT)
            self._value(self._number("<I"))
        for _ in range(tensors):
            self._text("a tensor's name", NAME_LIMIT)
            self._extents()
            self._take(4 + 8)  # type and offset, which the gguf package checks
        return tensors, pairs

    def _counts(self) -> tuple[int, int]:
        head = self.file.read(24)
        self.at = len(head)
        if head.startswith(b"version "):
            raise InputError(f"{self.name} is a Git LFS pointer, not the model. Run `git lfs pull`.")
        if len(head) < 24 or head[:4] != MAGIC:
            raise InputError(
                f"{self.name} does not begin as a GGUF file ({self.size:,} bytes). Download it again."
            )
        version, tensors, pairs = struct.unpack("<IQQ", head[4:])
        if version not in (2, 3) or tensors > MOST_TENSORS or pairs > MOST_PAIRS:
            raise InputError(
                f"{self.name}: GGUF version {version} with {tensors:,} tensors and {pairs:,} metadata keys; expected version 2 or "
                "3 and plausible counts. The file is damaged or big-endian."
            )
        return tensors, pairs

    def _value(self, kind: int) -> None:
        if kind in WIDTHS:
            self._take(WIDTHS[kind])
        elif kind == STRING:
            self._text("a metadata value", STRING_LIMIT)
        elif kind == ARRAY:
            self._array()
        else:
            raise InputError(
                f"{self.name} has a metadata value of the unknown type {kind}. Download it again."
            )

    def _array(self) -> None:
        inner, length = self._number("<I"), self._number("<Q")
        self.elements += length
        if self.elements > MOST_ELEMENTS:
            raise InputError(
                f"{self.name}: its metadata arrays have {self.elements:,} elements, above the limit of {MOST_ELEMENTS:,}. The file is "
                "damaged."
            )
        if inner in WIDTHS:
            self._take(WIDTHS[inner] * length)
        elif inner == STRING:
            for _ in range(length):
                self._text("a metadata value", STRING_LIMIT)
        else:
            raise InputError(
                f"{self.name} has a metadata array of the type {inner}, which no model needs. Use another file."
            )

    def _extents(self) -> None:
        count = self._number("<I")
        if not 1 <= count <= 4:
            raise InputError(
                f"{self.name} has a tensor of {count:,} dimensions, expected 1 to 4. Download it again."
            )
        extents = struct.unpack(f"<{count}Q", self._take(8 * count))
        if 0 in extents or math.prod(extents) > 8 * self.size:  # no type has more than 8 values a byte
            raise InputError(
                f"{self.name} is {self.size:,} bytes, in which a tensor of {' x '.join(f'{e:,}' for e in extents)} has no place: the "
                "file is cut short or damaged. Download it again; `sha256sum` of the source should match."
            )

    def _text(self, what: str, limit: int) -> None:
        length = self._number("<Q")
        if length > limit:
            raise InputError(
                f"{self.name} has {what} of {length:,} bytes, at most {limit:,} are read. Download it again."
            )
        self._take(length)

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(value)

    def _take(self, count: int) -> bytes:
        if self.at + count > self.size:
            raise InputError(
                f"{self.name} is {self.size:,} bytes, in which its header of {self.pairs:,} metadata keys and {self.tensors:,} "
                "tensors has no sound end: the file is cut short or damaged. Download it again and compare its sha256."
            )
        self.at += count
        return self.file.read(count)
