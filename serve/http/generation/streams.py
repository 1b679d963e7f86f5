"""Answers made from a run, whole or streamed: they end with their client, and close the run whatever happens."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.http.disconnect import ClientGone, abort_connection, while_connected
from serve.http.errors import ApiError
from serve.http.generation.runs import Run


class Holder(Protocol):
    """What has a run, and more that its answer needs."""

    @property
    def run(self) -> Run: ...


Started = TypeVar("Started", bound=Run | Holder)


class RunStream(Response):
    """Sends `chunks` as they come. An ApiError after the first byte is sent as the last chunk, made by `failed`."""

    background: BackgroundTask | None = None

    def __init__(
        self,
        run: Run,
        chunks: AsyncIterator[bytes],
        failed: Callable[[ApiError], bytes],
        timeout_s: float,
        media_type: str = "text/event-stream",
    ) -> None:
        self._run, self._chunks, self._failed, self._timeout_s = run, chunks, failed, timeout_s
        self.media_type = media_type
        self.status_code = 200
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send), self._timeout_s, self._run.given_up)
        except (ClientGone, asyncio.TimeoutError):
            abort_connection(scope)  # nobody reads any more
        finally:
            self._run.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": self._failed(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def answer_whole(
    request: Request,
    start: Callable[[], Coroutine[Any, Any, Started]],
    gather: Callable[[Started], Awaitable[Response]],
    timeout_s: float,
) -> Response:
    """Start a run, or something that holds one, gather it into one response, close it. Raises ClientGone where nobody waits any more."""

    async def work() -> Response:
        started = await start()
        try:
            return await gather(started)
        finally:
            (started if isinstance(started, Run) else started.run).close()

    return await while_connected(request.receive, work(), timeout_s)
