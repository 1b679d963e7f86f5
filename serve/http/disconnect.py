"""Work that ends with its client: runs a coroutine until it is done, its time is over, or the connection is closed."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection; nobody reads the answer."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """The result of `work`, whose request body must have been read. Cancels it and raises ClientGone or TimeoutError."""

    async def closed() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(closed())
    try:
        done, _ = await asyncio.wait({task, watch}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():  # also where both ended at once: what the work took must reach its owner
            return task.result()
        raise ClientGone if watch in done else asyncio.TimeoutError
    finally:
        for job in (task, watch):
            job.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
