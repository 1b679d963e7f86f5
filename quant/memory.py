"""How much memory this process may have: the machine's, or less where a container's limit (cgroup v1 or v2) says so."""

import os
from contextlib import suppress
from pathlib import Path

CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def memory_limit_bytes() -> int | None:
    """All that this process could ever have; None where the system does not say."""
    limits = [limit for limit, _ in _cgroup()]
    with suppress(ValueError, OSError):  # no such figure on this system: the cgroup's stands alone
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def memory_available_bytes() -> int | None:
    """What is free now; None where the system does not say."""
    free = [limit - used for limit, used in _cgroup()]
    with suppress(OSError, ValueError, IndexError):  # no /proc: the cgroup's figure stands alone
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    return min(free, default=None)


def _cgroup() -> list[tuple[int, int]]:
    """(limit, used) of the cgroups that set a limit."""
    found = []
    for limit, used in CGROUP_FILES:
        try:
            found.append((int(Path(limit).read_text()), int(Path(used).read_text())))
        except (OSError, ValueError):
            continue  # not this version of cgroups, or no limit ("max")
    return found
