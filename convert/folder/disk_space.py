"""Can the output be written where it is asked for: is the place writable, and is there room? Asked before the work."""

import errno
import os
import shutil
from pathlib import Path

from convert.errors import ResourceError
from convert.folder.files import write_failure
from convert.folder.json_files import show


def check_free_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raises ResourceError unless the disk of `folder` can be written and has `needed_bytes` and 5 % more.

    The folder need not exist yet: then the nearest parent that does is asked.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    usage = shutil.disk_usage(place)
    if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
        is_read_only = bool(os.statvfs(place).f_flag & os.ST_RDONLY)
        code = errno.EROFS if is_read_only else errno.EACCES
        raise write_failure(place, OSError(code, os.strerror(code)))
    if usage.total == 0:
        raise ResourceError(
            f"{show(str(folder))} cannot be written: the file system of {show(str(place))} keeps no files (it has 0 bytes in all). "
            "Choose another place."
        )
    wanted = needed_bytes * 1.05
    if usage.free < wanted:
        raise ResourceError(
            f"{purpose} needs {size_text(wanted)} on the disk of {show(str(folder))}, which has {size_text(usage.free)} free. "
            "Free space or choose another place."
        )


def size_text(count: float) -> str:
    """Bytes in the largest of KiB, MiB and GiB of which there is at least one, with two digits behind the point."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:.0f} bytes"
