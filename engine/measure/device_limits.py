"""What the device can do at most, measured beside what we do: copy bandwidth, peak memory, the share of time it works."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from engine.config import GIB

COPY_BYTES = {"cuda": 2 * GIB, "cpu": 256 * 1024**2}


def copy_bandwidth(device: torch.device, samples: int = 7) -> float:
    """Bytes read and written per second by a device-to-device copy, median of `samples` runs."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [timed(device, lambda: target.copy_(source)) for _ in range(samples)]
    return 2 * source.nbytes / statistics.median(times)


def timed(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of one call, the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Begin anew with `peak_gib`. On a CPU without Linux's way to do that, the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float:
    """Peak of the allocator since `reset_peak` on a GPU, peak resident memory of the process on the CPU; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    with suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def busy_share(call: Callable[[], object]) -> float:
    """Share of the wall time of `call()` in which at least one kernel or copy ran on the GPU, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        wall_s = time.perf_counter() - start
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type.name == "CUDA"
    )
    return covered(spans) * 1e-6 / wall_s


def covered(spans: list[tuple[float, float]]) -> float:
    """Total length of the union of intervals, which are sorted by their beginning."""
    total, end = 0.0, float("-inf")
    for begin, stop in spans:
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total
