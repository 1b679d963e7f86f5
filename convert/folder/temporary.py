"""A folder that appears whole or not at all, in a cache: made under a temporary name that says whether its maker is alive."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from convert.folder.files import TEMP_SUFFIX, sync_folder

LOCK = (
    ".lock"  # held by whoever fills a temporary folder; in the cache itself, while one is made or looked for
)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, whose parent exists; it gets that name at the end, or is removed where something fails.

    Where another process was faster, its folder stays. Raises OSError.
    """
    temp = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMP_SUFFIX}")
    with _locked(_cache_lock(target.parent)):
        temp.mkdir()
        handle = os.open(temp / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield temp
        try:
            temp.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        else:
            (target / LOCK).unlink()
        sync_folder(target.parent)
    finally:
        os.close(handle)
        shutil.rmtree(temp, ignore_errors=True)


def remove_abandoned(cache: Path) -> list[str]:
    """Remove the temporary folders of processes that were killed; returns their names. Those that are being filled stay."""
    removed: list[str] = []
    left = sorted(cache.glob(f".*{TEMP_SUFFIX}"))
    if not left:
        return removed
    with suppress(OSError), _locked(_cache_lock(cache)):
        for temp in left:
            if temp.is_dir() and not temp.is_symlink() and not _is_held(temp / LOCK):
                shutil.rmtree(temp, ignore_errors=True)
                removed.append(temp.name)
    return removed


def _cache_lock(cache: Path) -> Path:
    return cache.with_name(f".{cache.name}{LOCK}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_held(path: Path) -> bool:
    """Whether a living process holds the lock; one that was never made belongs to nobody."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
