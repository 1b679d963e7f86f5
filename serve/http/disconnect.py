"""Work that ends with its client: runs a coroutine until it is done, its time is over, or the connection is closed."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Scope

T = TypeVar("T")
ABORT = "tmq.abort"  # in the scope's extensions: closes the connection without waiting for its client to read


class ClientGone(Exception):
    """The client closed the connection, or does not read; nobody reads the answer."""


async def while_connected(
    receive: Receive, work: Coroutine[Any, Any, T], timeout_s: float, given_up: asyncio.Event | None = None
) -> T:
    """The result of `work`, whose request body must have been read. Cancels it and raises ClientGone or TimeoutError.

    `given_up`: also ends the work, once set, as if the client had gone.
    """

    async def closed() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watches = asyncio.create_task(work), [asyncio.create_task(closed())]
    if given_up is not None:
        watches.append(asyncio.create_task(given_up.wait()))  # type: ignore[arg-type]
    try:
        done, _ = await asyncio.wait({task, *watches}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():  # also where both ended at once: what the work took must reach its owner
            return task.result()
        raise ClientGone if done else asyncio.TimeoutError
    finally:
        for job in (task, *watches):
            job.cancel()
        await asyncio.gather(task, *watches, return_exceptions=True)


def abort_connection(scope: Scope) -> None:
    """Close the connection of a request at once, bytes that its client has not read included."""
    abort = scope.get("extensions", {}).get(ABORT)
    if abort is not None:
        abort()
