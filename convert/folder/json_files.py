"""Files of strangers, read within bounds: regular files alone, and JSON of limited size and depth, with no key twice.

A device, a FIFO or a socket is never opened in a way that waits. Knows no keys.
"""

import errno
import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

from convert.errors import InputError, ResourceError

CONFIG_LIMIT = 4 * 2**20  # bytes; the largest config.json in use is a few 100 KiB
INDEX_LIMIT = 256 * 2**20
DEPTH_LIMIT = 64
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def show(text: str, limit: int = 200) -> str:
    """A foreign name made safe to print: control characters escaped, cut at `limit` characters."""
    escaped = text.encode("unicode_escape", "backslashreplace").decode("ascii")
    return escaped if len(escaped) <= limit else escaped[:limit] + "..."


def show_value(value: Any, limit: int = 200) -> str:
    """A foreign value made safe to print, whatever its size: containers are cut before they are written out."""
    try:
        return show(_SHORT.repr(value), limit)
    except ValueError:  # an integer of more digits than Python writes
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a value too large"


def open_regular(path: Path) -> BinaryIO:
    """A regular file open for reading, without a buffer. Raises InputError for anything else of that name, without waiting."""
    try:
        # asked before opening, because opening some devices does something; and after it, because the name may change hands
        _check_regular(path, os.stat(path).st_mode)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError as error:
        raise InputError(
            f"{show(str(path))} may not be read: {error.strerror}. Change its permissions."
        ) from error
    except FileNotFoundError as error:
        raise InputError(
            f"{show(str(path))} does not exist: expected a file. Check that the copy is complete."
        ) from error
    except OSError as error:
        raise read_failure(path, error) from error
    except ValueError as error:  # a NUL inside
        raise InputError(f"{show(str(path))} is no usable path: {error}.") from error
    try:
        _check_regular(path, os.fstat(handle).st_mode)
    except BaseException:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb", buffering=0)


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    what = kinds.get(stat.S_IFMT(mode), "no regular file")
    raise InputError(f"{show(str(path))} is {what}: expected a file. Check that the copy is complete.")


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole file. Raises InputError when it is missing, not a file, unreadable or above `limit` bytes."""
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise InputError(
                    f"{show(str(path))} is {size:,} bytes, above the limit of {limit:,} for this kind of file: it is "
                    "not what its name says."
                )
            return read_up_to(file, limit)
        except OSError as error:
            raise read_failure(path, error) from error


def read_up_to(file: BinaryIO, limit: int) -> bytes:
    """Bytes from where the file stands, at most `limit`; fewer only where it ends. Raises OSError."""
    parts, left = [], limit
    while left and (part := file.read(min(left, 2**24))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def read_failure(path: Path, error: OSError) -> InputError | ResourceError:
    """The error of ours for an OSError met while reading `path`. It is not retried."""
    if error.errno in (errno.EIO, errno.ESTALE):
        return ResourceError(
            f"Reading {show(str(path))} failed: {error.strerror}. The disk or network file system lost it; check it, "
            "then run the same command again."
        )
    return InputError(f"{show(str(path))} cannot be read: {error.strerror}. Check the path.")


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object. Raises InputError for anything else, naming `name` and the place."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{name}: the key {show(key)!r} stands there twice. Keep one of them.")
            found[key] = value
        return found

    if not data.strip():
        raise InputError(f"{name} is empty: expected a JSON object. Copy it again from the source.")
    try:
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except RecursionError as error:
        raise InputError(
            f"{name} is nested too deep to be a configuration: at most {DEPTH_LIMIT}."
        ) from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise InputError(f"{name} holds a number that is too long: {error}.") from error
    if not isinstance(raw, dict):
        raise InputError(f"{name} holds a JSON {type(raw).__name__}, expected an object {{...}}.")
    if _deeper_than(raw, DEPTH_LIMIT):
        raise InputError(f"{name} is nested deeper than {DEPTH_LIMIT} levels: it is no configuration.")
    return raw


def read_object(path: Path, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """The JSON object in a file; errors as `read_bytes` and `parse_object`."""
    return parse_object(read_bytes(path, limit), show(str(path)))


def _deeper_than(value: Any, limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit + 1):
        children: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                children.extend(v for v in item.values() if isinstance(v, dict | list))
            elif isinstance(item, list):
                children.extend(v for v in item if isinstance(v, dict | list))
        if not children:
            return False
        level = children
    return True
