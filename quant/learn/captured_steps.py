"""Training steps that a GPU replays: captured once as a CUDA graph, so that launches cost nothing. On a CPU they are ordinary calls."""

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

import torch


@lru_cache(maxsize=8)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all steps: for each stream, cuBLAS keeps a workspace of up to 32 MiB and torch the memory freed in it."""
    return torch.cuda.Stream(device)


class Steps:
    """Runs a step again and again: on a GPU it is captured once as a CUDA graph and replayed, so that launches cost nothing.

    The step must read everything that changes from tensors. The first runs are ordinary ones and count as steps.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step, self._device = step, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = 0

    def run(self, count: int) -> None:
        """`count` further steps."""
        while count and (self._device.type != "cuda" or self._warm < 3):
            self._eager()
            count -= 1
        if not count:
            return
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        for _ in range(count):
            self._graph.replay()

    def _eager(self) -> None:
        if self._device.type != "cuda":
            self._step()
            return
        stream = _side_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._warm += 1

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        stream = _side_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                self._step()
            except BaseException:
                with suppress(RuntimeError):  # the capture is void: what it says of itself hides the cause
                    graph.capture_end()  # without it the process captures for ever
                raise
            graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._graph = graph
