"""A trace of requests on its way through an engine core, by the clock on the wall: when tokens came, and how long they were waited for."""

import time
from collections.abc import Callable, Sequence

from convert.errors import ResourceError
from engine.api import Event, Request, SamplingParams
from engine.measure.trace import TraceEntry
from engine.serving.core import EngineCore


class TraceRun:
    """A trace on its way through a core, by the clock on the wall."""

    def __init__(
        self,
        core: EngineCore,
        trace: Sequence[TraceEntry],
        rate: float,
        prompt: Callable[[int], tuple[int, ...]],
    ) -> None:
        self._core = core
        self._due = [entry.arrival_s / rate for entry in trace]
        self._requests = [_request(i, entry, prompt) for i, entry in enumerate(trace)]
        self._added = self._ended = 0
        self._began: float | None = None
        self._last_token: dict[str, float] = {}
        self.first_token_s: list[float] = []
        self.gaps_s: list[float] = []
        self.elapsed_s = 0.0

    def run(self, until: int | None = None, steps: int | None = None) -> None:
        """Go on until so many requests have ended (all of them), or for so many steps."""
        if self._began is None:
            self._began = time.perf_counter()
        goal = len(self._requests) if until is None else until
        while self._ended < goal and (steps is None or steps > 0):
            now = time.perf_counter() - self._began
            while self._added < len(self._due) and self._due[self._added] <= now:
                self._core.add(self._requests[self._added])
                self._added += 1
            if not self._core.has_work:
                time.sleep(max(0.0, self._due[self._added] - now))
                continue
            self._note(self._core.step())
            steps = None if steps is None else steps - 1

    def _note(self, events: list[Event]) -> None:
        assert self._began is not None
        raise_errors(events)
        now = time.perf_counter() - self._began
        for event in events:
            name = event.request_id
            if event.token_ids:
                if name in self._last_token:
                    self.gaps_s.append(now - self._last_token[name])
                else:
                    self.first_token_s.append(now - self._due[int(name)])
                self._last_token[name] = now
            if event.finish_reason is not None:
                self._ended += 1
                self.elapsed_s = now


def _request(index: int, entry: TraceEntry, prompt: Callable[[int], tuple[int, ...]]) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=entry.output_tokens, ignore_eos=True)
    return Request(str(index), prompt(entry.prompt_tokens), sampling)


def raise_errors(events: Sequence[Event]) -> None:
    for event in events:
        if event.error is not None:
            raise ResourceError(f"The measurement's request {event.request_id} failed: {event.error}")
