"""How much memory this process may have (the machine's, or less where a container's limit says so), and how much it has had.

Reads cgroups v1 and v2. Imports no torch before a GPU is asked about.
"""

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

GIB = 2**30
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


def peak_rss_gib() -> float:
    """Largest resident memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB


def gpu_peak_gib() -> float:
    """Largest memory that torch has held on any GPU so far, in GiB; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / GIB


def _cgroup() -> list[tuple[int, int]]:
    """(limit, used) of the cgroups that set a limit."""
    found = []
    for limit, used in CGROUP_FILES:
        try:
            found.append((int(Path(limit).read_text()), int(Path(used).read_text())))
        except (OSError, ValueError):
            continue  # not this version of cgroups, or no limit ("max")
    return found
