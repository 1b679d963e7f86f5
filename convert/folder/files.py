"""Files written so that a kill or a full disk leaves the old state or the new one: temporary name, fsync, rename, fsync.

Also digests, the lock of a work folder, and safetensors files with the same bytes for the same tensors.
Renames are atomic on local POSIX file systems; on others a digest in the manifest shows a torn file. No two of our names
differ in case alone, so file systems that fold case hold them too.
"""

import errno
import fcntl
import hashlib
import json
import os
import socket
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from convert.errors import InputError, ResourceError
from convert.folder.json_files import open_regular, read_failure, show
from convert.folder.paths import create_file, refuse_link
from convert.folder.processors import usable_processors

TEMP_SUFFIX = ".tmq-tmp"  # by this ending we know the temporary files as ours
CHUNK = 2**20  # bytes read at a time: they are still in the cache when they are hashed
TYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.uint8: "U8",
}


def atomic_write(path: Path, data: bytes | Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file whole or not at all. Returns (bytes, sha256). Raises ResourceError on a full or read-only disk.

    On failure the temporary file is removed and an existing file of that name stays as it was.
    """
    return atomic_write_all([(path, data)])[path]


def atomic_write_all(
    files: Iterable[tuple[Path, bytes | Iterable[bytes | memoryview]]],
) -> dict[Path, tuple[int, str]]:
    """Write files of one folder, each whole or not at all: all get their names, and the folder is synced, when all are on disk.

    Returns path -> (bytes, sha256). An iterator is taken file by file, so that one file at a time is in memory.
    """
    done: dict[Path, tuple[int, str]] = {}
    path = Path()
    try:
        try:
            for path, data in files:
                done[path] = 0, ""  # its temporary file is ours to remove from here on
                done[path] = _write_synced(temp_path(path), data)
                del data  # before the next file is made
            for path in done:
                temp_path(path).replace(path)
            for folder in {path.parent for path in done}:
                sync_folder(folder)
        except BaseException:
            for begun in done:
                temp_path(begun).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise write_failure(path, error) from error
    return done


def _write_synced(path: Path, data: bytes | Iterable[bytes | memoryview]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with create_file(path) as file:
        for chunk in (data,) if isinstance(data, bytes) else data:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def temp_path(path: Path) -> Path:
    """The temporary name under which `path` is written."""
    return path.with_name(f".{path.name}{TEMP_SUFFIX}")


def write_failure(path: Path, error: OSError) -> ResourceError:
    """The error of ours for an OSError met while writing `path`."""
    advice = {
        errno.ENOSPC: "the disk is full (or out of inodes). Free space",
        errno.EDQUOT: "the disk quota is used up. Free space",
        errno.EFBIG: "the file is above the file-size limit of this process (ulimit -f) or file system. Raise it",
        errno.EROFS: "the file system is read-only. Choose another place or remount it",
        errno.EACCES: "permission is denied. Change the folder's permissions or choose another place",
        errno.ENOENT: "the folder does not exist. Make it",
        errno.ENOTDIR: "a part of the path is a file. Choose another place",
        errno.EISDIR: "a folder of that name is there. Choose another name",
        errno.EPERM: "the operation is not permitted. Choose another place",
    }.get(error.errno or 0, f"{error.strerror}. Check the disk")
    return ResourceError(
        f"Writing {show(str(path))} failed: {advice}, then give the same command again; what is finished stays."
    )


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create the folder and its parents. Raises ResourceError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(folder, error) from error


def remove_temporaries(folder: Path) -> list[str]:
    """Remove our temporary files of an earlier crash from the folder; returns their names. Others are not touched."""
    removed = []
    for path in sorted(folder.glob(f".*{TEMP_SUFFIX}")):
        if path.is_dir() and not path.is_symlink():  # none of ours is a folder
            continue
        path.unlink(missing_ok=True)
        removed.append(path.name)
    return removed


def json_bytes(value: Any) -> bytes:
    """One spelling for one value: sorted keys, indented, no NaN, newline at the end."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """`json_bytes` of the value, written atomically."""
    atomic_write(path, json_bytes(value))


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file. Raises InputError or ResourceError when it cannot be read."""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    view = memoryview(buffer)
    with open_regular(path) as file:
        try:
            while count := file.readinto(buffer):  # type: ignore[attr-defined]
                digest.update(view[:count])
        except OSError as error:
            raise read_failure(path, error) from error
    return digest.hexdigest()


def worker_count() -> int:
    """Threads for work on many files: the processors this process may use and two that wait for the disk, at most 8."""
    return min(8, usable_processors() + 2)


def file_digests(paths: Iterable[Path]) -> dict[Path, str]:
    """Path -> hex sha256, by several threads. Raises InputError or ResourceError when one cannot be read."""
    listed = list(paths)
    with ThreadPoolExecutor(worker_count()) as pool:
        return dict(zip(listed, pool.map(sha256_file, listed), strict=True))


def combined_digest(digests: Mapping[Path, str]) -> str:
    """sha256 over the lines "sha256  name" of the files, sorted by name: the same wherever the folder lies."""
    lines = sorted((path.name, digest) for path, digest in digests.items())
    return sha256_bytes("".join(f"{digest}  {name}\n" for name, digest in lines).encode())


def check_output_place(out: Path, *sources: Path) -> None:
    """Raises InputError when the output is a source, lies inside one, or holds one."""
    target = out.resolve()
    for source in sources:
        real = source.resolve()
        if target == real or real in target.parents or target in real.parents:
            raise InputError(
                f"the output {show(str(out))} and the source {show(str(source))} lie one inside the other. Choose an output "
                "folder beside the source."
            )


def safetensors_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces: widest types first, then by name, so that all are aligned and the order is fixed."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    yield struct.pack("<Q", len(raw)) + raw
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().view(-1)
        yield flat.view(torch.uint8).numpy().data


class FolderLock:
    """One process works in a folder. The kernel frees the lock of a process that dies; pid and host are for the message."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> None:
        """Raises InputError naming pid and host when another process holds the lock, or held it on another host."""
        make_folder(self.path.parent)
        try:
            while self._handle is None:
                self._try()
        except OSError as error:
            raise write_failure(self.path, error) from error

    def _try(self) -> None:
        refuse_link(self.path)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(self.path, flags, 0o644)
        try:
            state = os.fstat(handle)
            if (
                not stat.S_ISREG(state.st_mode) or state.st_nlink > 1
            ):  # a second name: another file would be emptied
                raise InputError(
                    f"{show(str(self.path))} is no regular file with one name, which the lock of an output folder is. Remove it, or choose "
                    "another output folder."
                )
            held_by = self._owner(os.pread(handle, 4096, 0))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"{show(str(self.path.parent))} is in use by process {held_by[0]} on {held_by[1]}. Wait for it to end, or "
                    "choose another output folder."
                ) from error
            if held_by[1] not in ("", socket.gethostname()):
                raise InputError(
                    f"{show(str(self.path))} was left by process {held_by[0]} on the host {held_by[1]}, which cannot be asked "
                    "from here. If that process is gone, delete this file and start again."
                )
            try:
                same = os.fstat(handle).st_ino == os.stat(self.path).st_ino
            except FileNotFoundError:
                same = False
            if not same:  # its owner finished and removed it between our open and our lock: try the new one
                os.close(handle)
                return
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle

    @staticmethod
    def _owner(raw: bytes) -> tuple[str, str]:
        try:
            owner = json.loads(raw)
            return str(int(owner["pid"])), show(str(owner["host"]))
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
            return "unknown", ""

    def release(self) -> None:
        if self._handle is not None:
            try:
                self.path.unlink(missing_ok=True)
            finally:
                os.close(self._handle)
                self._handle = None

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
