"""Time by stage of a run, for whoever measures one: `with measuring(clock)` around it, `stage(name)` around each part of the work.

Without a clock `stage` does nothing. With one it waits for the GPU at both ends of each stage, so that every kernel is counted where
it was asked for. A stage inside another is not counted in the outer one: the seconds of all stages add up to the whole.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

OTHER = "other"  # what happens outside every stage


class StageClock:
    """Seconds by stage, and the moments at which blocks were done. Of one thread: other threads find no clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self.block_ends: list[float] = []  # on the clock of `time.perf_counter`
        self._names = [OTHER]
        self._since = time.perf_counter()

    def enter(self, name: str) -> None:
        """A stage begins."""
        self._count()
        self._names.append(name)

    def leave(self) -> None:
        """The stage that began last ends."""
        self._count()
        self._names.pop()

    def block_done(self) -> None:
        """One more block is done."""
        self._count()
        self.block_ends.append(self._since)

    def block_seconds(self) -> list[float]:
        """Seconds from the end of each block to that of the next."""
        return [end - start for start, end in zip(self.block_ends, self.block_ends[1:], strict=False)]

    def _count(self) -> None:
        if self._device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        name = self._names[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


_clock: ContextVar[StageClock | None] = ContextVar("clock of the stages", default=None)


@contextmanager
def measuring(clock: StageClock) -> Iterator[StageClock]:
    """Inside, stages are counted by this clock."""
    token = _clock.set(clock)
    clock.enter(OTHER)
    try:
        yield clock
    finally:
        clock.leave()
        _clock.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Around a part of the work, or as a decorator on a function: its time is counted under `name`."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    clock.enter(name)
    try:
        yield
    finally:
        clock.leave()


def block_done() -> None:
    """Says to the clock, where there is one, that a block is done."""
    clock = _clock.get()
    if clock is not None:
        clock.block_done()
