"""A thread that ends the process where the event loop stands still, after it has said where: a supervisor can then start anew.

Nothing on the loop blocks by design; this is for the mistake that nobody has made yet. It counts its own seconds and not the
clock's, so that a process that was stopped for a while (Ctrl-Z, a debugger) does not look like one that hangs.
"""

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Callable

log = logging.getLogger("tmq.serve")
LIMIT_S = 20.0
EXIT_CODE = 70


def _end() -> None:
    sys.stderr.flush()
    os._exit(EXIT_CODE)


class LoopWatch:
    """Calls `end` once `beat` was not called for `limit_s` of this thread's own seconds. Use as a context manager."""

    def __init__(
        self, limit_s: float | None = None, period_s: float = 1.0, end: Callable[[], None] = _end
    ) -> None:
        self._limit, self._period_s, self._end = max(1, round((limit_s or LIMIT_S) / period_s)), period_s, end
        self._beats = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loop-watch", daemon=True)

    def beat(self) -> None:
        """The loop runs."""
        self._beats += 1

    def _watch(self) -> None:
        seen, missed = self._beats, 0
        while not self._stopped.wait(self._period_s):
            missed = missed + 1 if self._beats == seen else 0
            seen = self._beats
            if missed >= self._limit:
                log.error(
                    "The server's event loop has stood still for %g s. The server ends; where it stood:",
                    missed * self._period_s,
                )
                if sys.stderr is sys.__stderr__:  # a test's own stderr has no file descriptor
                    faulthandler.dump_traceback(all_threads=True)
                self._end()
                return

    def __enter__(self) -> "LoopWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
