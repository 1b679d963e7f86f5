"""Names that came out of files, links, and files that we create: what may become a path, and where it may lead.

A name that a stranger wrote (in a manifest, a journal, an index) is checked here before it becomes a path. Files of ours are
created under a name that nobody else holds, and no link is followed where we write.
"""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from convert.errors import InputError
from convert.folder.json_files import show


def is_inner_name(name: Any) -> bool:
    """Whether a text is the relative path of a file inside a folder: no "..", no root, no control characters."""
    if not isinstance(name, str) or not name or len(name) > 4096 or name != str(PurePosixPath(name)):
        return False
    if name == "." or name.startswith("/") or ".." in PurePosixPath(name).parts:
        return False
    return "\\" not in name and all(character.isprintable() for character in name)


def refuse_linked_parents(folder: Path, names: Iterable[str]) -> None:
    """Raises InputError where a folder between `folder` and one of the files is a link: what we write would land elsewhere."""
    parents = {parent for name in names for parent in PurePosixPath(name).parents if parent.name}
    for parent in sorted(parents):
        refuse_link(folder / parent)


def refuse_link(path: Path) -> None:
    """Raises InputError where the path itself is a symbolic link."""
    if path.is_symlink():
        raise InputError(
            f"{show(str(path))} is a symbolic link, which an output folder never holds: nothing behind it was touched. "
            "Remove the link, or choose another output folder."
        )


def create_file(path: Path) -> BinaryIO:
    """A new file, open for writing. What held the name before (a link too) is removed, not followed. Raises OSError."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return os.fdopen(handle, "wb")


def append_file(path: Path) -> BinaryIO:
    """A file open for adding to its end, made where it is absent. Raises OSError, also where the path is a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "ab")


def link_root(folder: Path) -> Path:
    """The folder that links of a source folder may point into: itself, or all of one model in the cache of the hub."""
    real = folder.resolve()
    is_snapshot = real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")
    return real.parent.parent if is_snapshot else real


def refuse_leaving_links(folder: Path, paths: Iterable[Path]) -> None:
    """Raises InputError naming the links among `paths` that lead out of the folder: their content is not the folder's to give."""
    root: Path | None = None
    leaving = []
    for path in paths:
        if not path.is_symlink():
            continue
        root = link_root(folder) if root is None else root
        try:
            target = path.resolve()
        except (OSError, RuntimeError):  # a loop
            target = Path("/")
        if root not in target.parents:
            leaving.append(path.name)
    if leaving:
        names = ", ".join(show(name) for name in sorted(leaving)[:5])
        raise InputError(
            f"{show(str(folder))} holds {len(leaving)} symbolic links that lead out of it: {names}. They are not followed, because "
            "a private file could be copied into what is then shared. Replace each by the file itself, or remove it."
        )
