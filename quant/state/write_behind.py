"""Writes files of a run in the background, in order, one job at a time, while the next block is computed.

A run may be killed between two jobs or inside one; files are never written in another order than they were given.
"""

import queue
import threading
from collections.abc import Callable
from types import TracebackType

PENDING = 2  # jobs that may wait or be under way: what they hold in memory is bounded
PATIENCE_S = 5.0  # for the job under way when the user interrupts the run


class WriteBehind:
    """Jobs that one thread does in the order in which they were given. A context manager: it ends when all are done.

    An error of a job is raised by the next call, and no job after it is done.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._places = threading.Semaphore(PENDING)
        self._error: BaseException | None = None
        # a daemon: a process that is told to end does not wait for it
        self._thread = threading.Thread(target=self._work, name="write behind", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        """Do the job later; waits while too many are pending."""
        self._places.acquire()
        self._raise()
        self._jobs.put(job)

    def wait(self) -> None:
        """Until every job is done."""
        self._jobs.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    job()
            except BaseException as error:
                self._error = error
            finally:
                del job
                self._places.release()
                self._jobs.task_done()

    def __enter__(self) -> "WriteBehind":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the jobs; where the run itself failed, its error is the one that is raised."""
        self._jobs.put(None)
        is_interrupted = error is not None and not isinstance(error, Exception)
        self._thread.join(PATIENCE_S if is_interrupted else None)
        if error is None:
            self._raise()
