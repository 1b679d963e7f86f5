"""Whether the engine answers: tokens seen a moment ago, or a one-token request that comes back in time."""

import asyncio
import time
import uuid

from engine.api import Engine, EngineDied, Request, SamplingParams, Stats
from serve.http.errors import ApiError, unavailable
from serve.http.generation.runs import Runs

_FRESH_S = 1.0


class Health:
    """Answers /health. Callers at the same time share one probe, so that asking often costs little."""

    def __init__(self, engine: Engine, runs: Runs, timeout_s: float) -> None:
        self._engine, self._runs, self._timeout_s = engine, runs, timeout_s
        self._probe: asyncio.Task[None] | None = None
        self._proved = 0.0
        self.dead = False

    def stats(self) -> Stats:
        """The engine's figures; raises ApiError 503 where it is gone."""
        if self.dead:
            raise unavailable("The engine has stopped. The server is ending.")
        try:
            return self._engine.stats()
        except EngineDied as e:
            raise unavailable("The engine has stopped. The server is ending.") from e

    async def check(self) -> Stats:
        """Return the engine's figures once it has proved that it works; raises ApiError 503 otherwise."""
        before = self.stats()
        if time.monotonic() - max(self._runs.last_token, self._proved) < _FRESH_S:
            return before
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._ask())
        try:
            await asyncio.wait_for(asyncio.shield(self._probe), self._timeout_s)
        except asyncio.TimeoutError as e:
            after = self.stats()
            worked = (after.prompt_tokens_total, after.generated_tokens_total)
            if worked == (before.prompt_tokens_total, before.generated_tokens_total):
                raise unavailable(f"The engine has done nothing for {self._timeout_s:g} s.") from e
        return self.stats()

    async def _ask(self) -> None:
        request = Request(
            f"health-{uuid.uuid4().hex}", (0,), SamplingParams(max_tokens=1, temperature=0.0), self._timeout_s
        )
        try:
            self._engine.submit(request)
            async for event in self._engine.events(request.id):
                if event.finish_reason == "error":
                    raise ApiError(503, "The engine fails the smallest request.", code="unavailable")
                if event.token_ids:
                    self._proved = time.monotonic()
        except EngineDied as e:
            raise unavailable("The engine has stopped. The server is ending.") from e
