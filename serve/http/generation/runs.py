"""Runs: the sequences of one HTTP request on the engine, from admission to release. Whoever starts a run must close it.

`Runs` knows all that are open, so that the death of the engine or the end of the server reaches each of them.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from engine.api import Engine, EngineDied, Event, Request, SamplingParams
from serve.http.errors import ApiError, unavailable
from serve.http.generation.admission import Admission
from serve.http.metrics import Metrics
from serve.limits import SEED_MAX, SEED_MIN, Limits

log = logging.getLogger("tmq.serve")


def _weight(event: Event) -> int:
    """What an event takes while it waits, in tokens and alternatives to them."""
    scored = (*event.logprobs, *event.prompt_logprobs)
    return len(event.token_ids) + len(scored) + sum(len(p.top) for p in scored)


class Run:
    """Some sequences in flight. Iterate for (index, event) in the order of arrival; raises ApiError where one fails."""

    def __init__(self, owner: "Runs", ids: list[str], client: str) -> None:
        self._owner, self._ids, self._client = owner, ids, client
        self._open = set(range(len(ids)))
        self._closed = False
        self._news: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()
        self._held = len(ids)  # places in the queue that this run still has
        self.unread = 0  # tokens and alternatives that nobody has taken yet
        self.given_up = asyncio.Event()  # its client reads too slowly: whoever sends to it should stop
        self._started = time.monotonic()
        self._last_event = [0.0] * len(ids)
        for index, id in enumerate(ids):
            owner.keep(asyncio.create_task(self._pump(index, id)))
        self.prompt_tokens = 0
        self.completion_tokens = 0

    @property
    def size(self) -> int:
        """Sequences of this run."""
        return len(self._ids)

    async def _pump(self, index: int, request_id: str) -> None:
        try:
            async for event in self._owner.engine.events(request_id):
                self._owner.make_room(self)
                if not self._closed:
                    self._count(_weight(event))
                    self._news.put_nowait((index, event))
        except EngineDied:
            self.fail(unavailable("The engine has stopped. The server is ending."))
        except Exception:
            log.exception("The events of request %s broke off.", request_id)
            self.fail(ApiError(500, "The engine could not finish this request.", code="engine_error"))
        finally:
            self._give_back(1)  # the engine is done with it, whether its client has read it or not

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self._open:
            news = await self._news.get()
            if isinstance(news, ApiError):
                raise news
            index, event = news
            self._count(-_weight(event))
            self._note(index, event)
            if event.finish_reason == "error":
                raise ApiError(
                    500, event.error or "The engine could not finish this request.", code="engine_error"
                )
            if event.finish_reason == "timeout":
                raise ApiError(
                    504,
                    f"Not finished within {self._owner.limits.request_s:g} s. Ask for fewer tokens, or stream.",
                    code="timeout",
                )
            yield index, event

    def _note(self, index: int, event: Event) -> None:
        now, metrics = time.monotonic(), self._owner.metrics
        if event.token_ids:
            first = not self._last_event[index]
            if first:
                metrics.first_token_s.observe(now - self._started)
            else:
                metrics.token_gap_s.observe((now - self._last_event[index]) / len(event.token_ids))
            self._last_event[index] = now
            self._owner.last_token = now
        if event.finish_reason:
            self._open.discard(index)
            self.prompt_tokens += event.prompt_tokens
            self.completion_tokens += event.completion_tokens
            metrics.finished.labels(event.finish_reason).inc()

    def _count(self, weight: int) -> None:
        self.unread += weight
        self._owner.unread += weight

    def _give_back(self, sequences: int) -> None:
        """Free places in the queue."""
        sequences = min(sequences, self._held)
        self._held -= sequences
        if sequences:
            self._owner.release(sequences, self._client)

    def give_up(self) -> None:
        """End the run because its client does not read: it loses what is left of the answer."""
        log.warning("A client reads too slowly: its answer is given up with %d tokens unread.", self.unread)
        self.given_up.set()
        self.close()
        self.fail(ApiError(408, "The answer was read too slowly.", code="read_too_slowly"))

    def stop(self) -> None:
        """Ask the engine to end all sequences; their last events still come."""
        for index in sorted(self._open):
            self._owner.abort(self._ids[index])

    def fail(self, error: ApiError) -> None:
        """End the run with an error for its client."""
        self._news.put_nowait(error)

    def close(self) -> None:
        """Abort what is unfinished and give the place in the queue back. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._open:
            self._owner.metrics.finished.labels("abandoned").inc(len(self._open))
            self.stop()
        # The pumps in Runs go on to the last event, so that the engine's own books close, too.
        self._count(-self.unread)
        self._give_back(self._held)
        self._owner.discard(self)


class Runs:
    """All open runs of a server."""

    def __init__(self, engine: Engine, admission: Admission, metrics: Metrics, limits: Limits) -> None:
        self.engine, self.metrics, self.limits = engine, metrics, limits
        self._admission = admission
        self._open: set[Run] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: ApiError | None = None
        self.unread = 0  # of all runs
        self.last_token = 0.0  # time.monotonic() of the newest token of any run

    @property
    def count(self) -> int:
        return len(self._open)

    def start(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, n: int, request_id: str, client: str
    ) -> Run:
        """Submit n sequences for each prompt. Raises ApiError: 429 where the queue is full, 503 where the server ends."""
        if self._ending:
            raise self._ending
        sequences = len(prompts) * n
        self._admission.admit(sequences, client)
        ids: list[str] = []
        try:
            for index in range(sequences):
                chosen = sampling
                if sampling.seed is not None and n > 1:
                    # n answers to one seed: n different ones, the same in each repetition.
                    seed = SEED_MIN + (sampling.seed + index % n - SEED_MIN) % (SEED_MAX - SEED_MIN + 1)
                    chosen = replace(sampling, seed=seed)
                prompt = tuple(prompts[index // n])
                request = Request(f"{request_id}-{index}", prompt, chosen, self.limits.request_s, client)
                ids.append(self.engine.submit(request))
        except EngineDied as e:
            self._undo(ids, sequences, client)
            raise unavailable("The engine has stopped. The server is ending.") from e
        except BaseException:
            self._undo(ids, sequences, client)
            raise
        run = Run(self, ids, client)
        self._open.add(run)
        return run

    def _undo(self, ids: list[str], sequences: int, client: str) -> None:
        for id in ids:
            self.abort(id)
        self._admission.release(sequences, client)

    def abort(self, engine_id: str) -> None:
        with contextlib.suppress(EngineDied):  # then nothing runs any more
            self.engine.abort(engine_id)

    def keep(self, task: "asyncio.Task[None]") -> None:
        """Hold a task until it is done; the event loop alone would not."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def discard(self, run: Run) -> None:
        self._open.discard(run)

    def release(self, sequences: int, client: str) -> None:
        self._admission.release(sequences, client)

    def make_room(self, run: Run) -> None:
        """Before an event of `run` is kept: give up the runs whose clients leave too much unread."""
        if run.unread > self.limits.unread:
            run.give_up()
        while self.unread > self.limits.unread_in_all:
            max(self._open, key=lambda r: r.unread).give_up()

    def refuse(self, reason: ApiError) -> None:
        """Answer every further start with `reason`."""
        self._ending = reason

    def fail_all(self, error: ApiError) -> None:
        """End all open runs with an error, and refuse new ones."""
        self._ending = self._ending or error
        for run in list(self._open):
            run.fail(error)
