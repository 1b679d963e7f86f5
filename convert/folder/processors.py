"""How many processors this process may use: its affinity, or less where a container's quota of CPU time (cgroup v1 or v2) says so."""

import math
import os
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_processors() -> int:
    """Processors that this process can keep busy, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def _quota() -> float | None:
    """CPU time that the container grants in a unit of time; None where it sets no limit."""
    with suppress(OSError, ValueError):  # not this version of cgroups, or no limit ("max")
        granted, period = (CGROUP / "cpu.max").read_text().split()
        return int(granted) / int(period)
    with suppress(OSError, ValueError):
        granted_us = int((CGROUP / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((CGROUP / "cpu/cpu.cfs_period_us").read_text())
        return granted_us / period_us if granted_us > 0 else None
    return None


def choose_threads(environment: MutableMapping[str, str]) -> None:
    """Tell OpenMP, before it is loaded, to use the processors there are and to sleep while threads wait for each other.

    By itself it counts the processors of the affinity alone, and its threads spin while they wait. Next to other work on the same
    processors that is ruinous: a run with two threads on two processors shared by ten processes took 79 s, sleeping ones 13 s.
    What the user has set is left.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    count = usable_processors()
    if hasattr(os, "sched_getaffinity") and count < len(os.sched_getaffinity(0)):
        environment.setdefault("OMP_NUM_THREADS", str(count))
