"""Notices that a file changed while it was in use. Its digest decides, where one is known; before that, any change of its state.

Size, times and inode only say when to look: a file written in place keeps size and inode, and its time of change can be put back
(the time of its inode cannot, but that one moves without a change of content as well).
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from convert.errors import InputError
from convert.folder.files import sha256_file
from convert.folder.json_files import read_failure, show


class Unchanged:
    """The state of files that are read over a long time."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._state = {path: _state(path) for path in paths}
        self._digests: dict[Path, str] = {}

    def remember(self, digests: Mapping[Path, str]) -> None:
        """Take over sha256 digests that were made since the start. Raises InputError where a file changed meanwhile."""
        self.check()
        self._digests |= {path: digest for path, digest in digests.items() if path in self._state}

    def check(self, paths: Iterable[Path] | None = None) -> None:
        """Raises InputError naming a file (None: of all of them) that is not what it was."""
        for path in self._state if paths is None else paths:
            now = _state(path)
            if now == self._state[path]:
                continue
            known = self._digests.get(path)
            if known is None or sha256_file(path) != known:
                raise InputError(
                    f"{show(path.name)} was changed while it was in use. Wait until nothing writes to the source, then start again."
                )
            self._state[path] = now


def _state(path: Path) -> tuple[int, ...]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise read_failure(path, error) from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev
