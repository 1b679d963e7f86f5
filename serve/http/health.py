"""Whether the engine answers: tokens seen a moment ago, or a one-token request that comes back in time."""

import asyncio
import time
import uuid

from engine.api import Engine, EngineDied, Request, SamplingParams, Stats
from serve.http.errors import ApiError, unavailable
from serve.http.generation.runs import Runs

_FRESH_S = 1.0
_SILENCE_S = (
    2.5  # without a sign of life, of which one comes each second: not healthy, though it may come back
)
_PATIENCE_S = 0.5  # of one call of /health; the request behind it may take longer


class Health:
    """Answers /health at once: 200 while the engine works, 503 where it hangs, fails or is gone.

    Callers at the same time share one probe, so that asking often costs little. A probe that waits behind other work is no
    fault while that work goes on; one that waits `timeout_s` seconds in which nothing is done is.
    """

    def __init__(self, engine: Engine, runs: Runs, timeout_s: float) -> None:
        self._engine, self._runs, self._timeout_s = engine, runs, timeout_s
        self._probe: asyncio.Task[None] | None = None
        self._proved = 0.0
        self._work: tuple[int, int] = (0, 0)  # tokens read and generated when last looked at
        self._worked = 0.0  # when they last grew, or the probe began
        self.problem: str | None = None  # of an engine that will not come back

    def stats(self) -> Stats:
        """The engine's figures; raises ApiError 503 where it is gone or hangs."""
        trouble = self.problem or self._engine.trouble(_SILENCE_S)
        if trouble:
            raise unavailable(trouble)
        try:
            return self._engine.stats()
        except EngineDied as e:
            raise unavailable("The engine has stopped. The server is ending.") from e

    async def check(self) -> Stats:
        """Return the engine's figures while it works; raises ApiError 503 otherwise."""
        before = self.stats()
        if time.monotonic() - max(self._runs.last_token, self._proved) < _FRESH_S:
            return before
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._ask())
            self._worked = time.monotonic()
        self._look(before)
        await asyncio.wait({self._probe}, timeout=min(_PATIENCE_S, self._timeout_s))
        if self._probe.done():
            self._probe.result()
            return self.stats()
        after = self.stats()
        self._look(after)
        if time.monotonic() - self._worked >= self._timeout_s:
            raise self._idle()
        return after

    def _look(self, stats: Stats) -> None:
        work = (stats.prompt_tokens_total, stats.generated_tokens_total)
        if work != self._work:
            self._work, self._worked = work, time.monotonic()

    def _idle(self) -> ApiError:
        return unavailable(f"The engine has done nothing for {self._timeout_s:g} s.")

    async def _ask(self) -> None:
        request = Request(
            f"health-{uuid.uuid4().hex}",
            (0,),
            SamplingParams(max_tokens=1, temperature=0.0),
            self._timeout_s,
            client="/health",
        )
        try:
            before = self._engine.stats()
            self._engine.submit(request)
            async for event in self._engine.events(request.id):
                if event.finish_reason == "error":
                    raise ApiError(503, "The engine fails the smallest request.", code="unavailable")
                if event.token_ids:
                    self._proved = time.monotonic()
                elif event.finish_reason == "timeout":
                    after = self._engine.stats()
                    if after.generated_tokens_total == before.generated_tokens_total:
                        raise self._idle()
        except EngineDied as e:
            raise unavailable("The engine has stopped. The server is ending.") from e
