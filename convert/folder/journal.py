"""The journal of an output folder: which files a run began and finished, with size and digest. Survives a kill at any moment."""

import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.folder.files import write_failure
from convert.folder.json_files import INDEX_LIMIT, read_bytes, show, show_value
from convert.folder.paths import append_file, is_inner_name, refuse_link


class Journal:
    """Lines of JSON, the last one of a path counts. `entries`: path -> {path, state: begun or done, bytes, sha256, tensors}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()  # files may be written by several threads

    def note(self, entries: Iterable[dict[str, Any]]) -> None:
        """Add entries, on disk when this returns. Raises ResourceError where that is not possible."""
        listed = list(entries)
        try:
            with self._lock, append_file(self.path) as file:
                file.write(b"".join(json.dumps(entry, sort_keys=True).encode() + b"\n" for entry in listed))
                file.flush()
                os.fsync(file.fileno())
                self.entries |= {entry["path"]: entry for entry in listed}
        except OSError as error:
            raise write_failure(self.path, error) from error

    def read(self) -> None:
        """Take over what an earlier run noted; a line that was being written when it was killed is closed and does not count.

        Raises InputError for a name that is no path inside the folder: no run of ours notes one.
        """
        self.entries = {}
        refuse_link(self.path)
        raw = read_bytes(self.path, INDEX_LIMIT) if self.path.exists() else b""
        for line in raw.split(b"\n"):
            entry = _entry(line)
            if entry is None:
                continue
            if not is_inner_name(entry["path"]):
                raise InputError(
                    f"{show(str(self.path))} names {show_value(entry['path'])}, which is no path inside the output folder: nothing "
                    "was touched. The folder is not what a run of ours left. Choose another output folder."
                )
            self.entries[entry["path"]] = entry
        if raw and not raw.endswith(b"\n"):
            with append_file(self.path) as file:
                file.write(b"\n")


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry of one line; None where it is cut or of another shape, so that its file counts as not written."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        return None
    if entry.get("state") == "begun":
        return entry
    is_done = entry.get("state") == "done" and type(entry.get("bytes")) is int
    is_whole = isinstance(entry.get("sha256"), str) and isinstance(entry.get("tensors", {}), dict)
    return entry if is_done and is_whole else None
