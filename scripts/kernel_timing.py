"""How kernel benchmarks measure: times of CUDA-graph replays over rotating weights, and the peaks of the card.

A graph holds several hundred calls, so that launch cost on the host does not count; the gap between graph nodes does,
as it would in a decode step. Weights rotate over copies that together exceed 4 x L2, as those of a model do.
"""

import gc
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

GRAPH_US = 1500.0  # a graph lasts at least about this long, so that its launch (about 10 us) does not count
SAMPLES = 7


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median of the samples, and (largest - smallest) / median."""

    us: float
    spread: float


def wait_or_stop(workers: "Sequence[subprocess.Popen[bytes]]", until: float) -> int:
    """Wait for processes that compile; at `until` (time.time()) those that are left are stopped: how many."""
    while time.time() < until and any(worker.poll() is None for worker in workers):
        time.sleep(0.1)
    late = [worker for worker in workers if worker.poll() is None]
    for worker in late:
        worker.terminate()
    return len(late)


def event_us(call: Callable[[], None]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e3


def quiet_capture() -> None:
    """Keep `torch.cuda.graph` from collecting garbage and emptying the cache at each capture: thousands are made."""
    gc.disable()
    gc.collect = lambda *_: 0  # type: ignore[assignment]
    torch.cuda.empty_cache = lambda: None


def time_graph(call: Callable[[int], object], copies: int, about_us: float, samples: int = SAMPLES) -> Timing:
    """Time of call(i), i running over the copies. `about_us`: expected time of one call, which sets the graph's length."""
    rounds = max(1, math.ceil(GRAPH_US / max(about_us, 2.0) / copies))
    calls = rounds * copies
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    graph.replay()
    torch.cuda.synchronize()

    def replay_twice() -> None:
        graph.replay()
        graph.replay()

    times = [event_us(replay_twice) / (2 * calls) for _ in range(samples)]
    middle = statistics.median(times)
    return Timing(middle, (max(times) - min(times)) / middle)


@dataclass(frozen=True)
class Peaks:
    """Device-to-device copy in bytes read and written per us, and fp16 products in flop per us, both measured."""

    name: str
    copy_bytes_per_us: float
    flop_per_us: float
    l2_bytes: int

    def roof_us(self, size_bytes: float, flop: float) -> float:
        return max(size_bytes / self.copy_bytes_per_us, flop / self.flop_per_us)


def measure_peaks() -> Peaks:
    properties = torch.cuda.get_device_properties(0)
    return Peaks(properties.name, _copy_peak(), _product_peak(), properties.L2_cache_size)


def _copy_peak() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * source.numel() / min(event_us(copy) for _ in range(12))


def _product_peak() -> float:
    size = 8192
    left, right = (torch.randn(size, size, device="cuda").half() for _ in range(2))

    def product() -> None:
        torch.mm(left, right)

    return 2 * size**3 / statistics.median([event_us(product) for _ in range(12)][3:])


def copies_for(size_bytes: int, l2_bytes: int) -> int:
    """Copies of a weight that together exceed 4 x L2, two at least."""
    return max(2, math.ceil(4 * l2_bytes / size_bytes))
