"""Tensors in the work folder of a run, each file with a mark beside it: a JSON file with its digest, written after it.

A file that is damaged, or that a kill left without its mark, is never taken for a saved one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from convert.errors import TmqError
from convert.folder.files import atomic_write, safetensors_chunks, sha256_file, write_json
from convert.folder.json_files import INDEX_LIMIT, read_bytes
from convert.folder.state import read_signed, self_digest
from convert.hf.safetensors_files import read_header, read_tensor


@dataclass(frozen=True)
class SavedTensors:
    """A file read back whole: its tensors, and what its mark says of it."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **facts: Any) -> None:
    """Write a safetensors file, then its mark with these facts. Raises ResourceError on a full disk."""
    mark = mark_of(path)
    mark.unlink(missing_ok=True)  # it speaks of the file before
    _, digest = atomic_write(path, safetensors_chunks(tensors))
    write_json(mark, {**facts, "sha256": digest})


def load_tensors(path: Path) -> SavedTensors | None:
    """What was saved, or None where it is absent or damaged."""
    if (facts := whole_facts(path)) is None:
        return None
    return SavedTensors({name: read_tensor(info) for name, info in read_header(path).items()}, facts)


def whole_facts(path: Path) -> dict[str, Any] | None:
    """What the mark says of a file that is there, whole; None where it is not."""
    facts = read_record(mark_of(path))
    is_whole = facts is not None and path.is_file() and facts.get("sha256") == sha256_file(path)
    return facts if is_whole else None


def is_marked(path: Path) -> bool:
    """Whether a file was saved here, whole or damaged since."""
    return read_record(mark_of(path)) is not None and path.is_file()


def remove_tensors(path: Path) -> None:
    """Remove a file and its mark, the mark first."""
    for one in (mark_of(path), path):
        one.unlink(missing_ok=True)


def mark_of(path: Path) -> Path:
    """The mark of a file of tensors."""
    return path.with_suffix(".json")


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object of the work folder, or None where it is absent, cut or of another kind: its work is then done again."""
    try:
        record = json.loads(read_bytes(path, INDEX_LIMIT))
    except (TmqError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def write_signed_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record with its own digest. Raises ResourceError on a full disk."""
    document = {"record": dict(record)}
    write_json(path, document | {"digest": self_digest(document)})


def read_signed_record(path: Path) -> dict[str, Any] | None:
    """What `write_signed_record` wrote, or None where it is absent or a byte of it changed: its work is then done again."""
    try:
        record = read_signed(path).get("record")
    except TmqError:
        return None
    return record if isinstance(record, dict) else None
