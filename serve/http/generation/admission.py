"""How much the server takes on: sequences in flight, in all and for each client. Beyond that, 429 with Retry-After."""

import math
import time
from collections import Counter

from serve.http.errors import ApiError


class Admission:
    """Counts sequences from admission until the engine has finished them. Not for several threads: the event loop owns it."""

    def __init__(self, most: int, most_per_client: int) -> None:
        self._most, self._most_per_client = most, most_per_client
        self._clients: Counter[str] = Counter()
        self._last_release = time.monotonic()
        self._release_gap_s = 1.0  # moving mean of the time between two releases
        self.pending = 0
        self.refused_total = 0

    def admit(self, sequences: int, client: str) -> None:
        """Count `sequences` in, or raise 429. `release` must follow each success."""
        if self.pending + sequences > self._most:
            raise self._refusal(f"The queue is full: {self.pending} of {self._most} sequences are pending.")
        if self._clients[client] + sequences > self._most_per_client:
            raise self._refusal(
                f"Too many requests at once: {self._clients[client]} of the {self._most_per_client} "
                "sequences that one client may have pending."
            )
        self.pending += sequences
        self._clients[client] += sequences

    def release(self, sequences: int, client: str) -> None:
        self.pending -= sequences
        self._clients[client] -= sequences
        if self._clients[client] <= 0:
            del self._clients[client]
        now = time.monotonic()
        self._release_gap_s += 0.1 * (now - self._last_release - self._release_gap_s)
        self._last_release = now

    def _refusal(self, message: str) -> ApiError:
        self.refused_total += 1
        wait_s = min(60, max(1, math.ceil(2 * self._release_gap_s)))
        return ApiError(
            429,
            f"{message} Try again in {wait_s} s.",
            code="queue_full",
            headers={"Retry-After": str(wait_s)},
        )
