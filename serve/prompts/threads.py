"""A call in a thread of its own that ends with its time: for Python code that may loop, such as a chat template.

The thread is interrupted between two bytecodes; a single long call into a library runs to its end, unheard.
"""

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class _Interrupted(BaseException):
    """Raised inside the thread whose time is over. Not an Exception, so that no `except Exception` holds it up."""


async def call_in_thread(function: Callable[[], T], timeout_s: float) -> T:
    """The result of `function()`, computed beside the event loop. Raises asyncio.TimeoutError and what it raises."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = function()
        except Exception as e:
            error = e
        with contextlib.suppress(RuntimeError):  # the loop may have ended
            loop.call_soon_threadsafe(settle, result, error)

    def run() -> None:
        with contextlib.suppress(_Interrupted):
            work()

    thread = threading.Thread(target=run, name="tmq-prompt", daemon=True)
    thread.start()
    try:
        return await asyncio.wait_for(asyncio.shield(future), timeout_s)
    finally:
        if not future.done():  # its time is over, or nobody waits any more
            future.cancel()
            if thread.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident), ctypes.py_object(_Interrupted)
                )
