"""The journal of an output folder: which files a run began and finished, with size and digest. Survives a kill at any moment."""

import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convert.folder.files import write_failure


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
            with self._lock, self.path.open("ab") as file:
                file.write(b"".join(json.dumps(entry, sort_keys=True).encode() + b"\n" for entry in listed))
                file.flush()
                os.fsync(file.fileno())
                self.entries |= {entry["path"]: entry for entry in listed}
        except OSError as error:
            raise write_failure(self.path, error) from error

    def read(self) -> None:
        """Take over what an earlier run noted; a line that was being written when it was killed is closed and does not count."""
        self.entries = {}
        raw = self.path.read_bytes() if self.path.is_file() else b""
        for line in raw.split(b"\n"):
            try:
                entry = json.loads(line)
                self.entries[entry["path"]] = entry
            except (ValueError, KeyError, TypeError):
                continue
        if raw and not raw.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")
