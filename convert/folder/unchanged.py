"""Notices that a file changed while it was in use: size, time of change and inode, as they were at first."""

import os
from collections.abc import Iterable
from pathlib import Path

from convert.errors import InputError
from convert.folder.json_files import read_failure, show


class Unchanged:
    """The state of files that are read over a long time."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._state = {path: _state(path) for path in paths}

    def check(self, paths: Iterable[Path] | None = None) -> None:
        """Raises InputError naming a file (None: of all of them) that is not what it was."""
        for path in self._state if paths is None else paths:
            if _state(path) != self._state[path]:
                raise InputError(
                    f"{show(path.name)} was changed while it was in use. Wait until nothing writes to the source, then start again."
                )


def _state(path: Path) -> tuple[int, int, int]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise read_failure(path, error) from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
