"""Conversations that the server keeps for /v1/chat/interactive: bounded in number, forgotten when idle, one per client and id.

A client that opens many loses its own oldest ones. What was forgotten is remembered by its id: the next turn is answered 404,
not continued as if it were the first.
"""

import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

from serve.http.errors import ApiError
from serve.http.generation.runs import Run
from serve.limits import Limits

Key = tuple[str, int]  # client and session id


@dataclass(eq=False)
class Session:
    """Messages so far and their length in tokens. `busy` while a turn is answered; `run` is that answer."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    busy: bool = False
    run: Run | None = None
    last_used: float = field(default_factory=time.monotonic)


class Sessions:
    """Sessions by (client, id): one client never sees another's, as far as keys or addresses tell them apart."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sessions: OrderedDict[Key, Session] = OrderedDict()
        self._forgotten: OrderedDict[str, OrderedDict[int, None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, client: str, session_id: int) -> Session:
        """The session, made where it is new, marked busy.

        Raises ApiError 409 while another turn runs, 404 where it was forgotten, 429 if all are busy.
        """
        self._forget_idle()
        key = (client, session_id)
        session = self._sessions.get(key)
        if session is None:
            if session_id in self._forgotten.get(client, ()):
                raise ApiError(
                    404,
                    f"Session {session_id} is gone: the server keeps {self._limits.sessions_per_client} conversations of a "
                    f"client, {self._limits.sessions} in all, for {self._limits.session_idle_s:g} s. Take another "
                    "session_id, or end this one (an empty prompt with request_output_len: 0) to begin it anew.",
                    param="session_id",
                    code="session_gone",
                )
            self._make_room(client)
            session = self._sessions[key] = Session()
        if session.busy:
            raise ApiError(
                409, f"Session {session_id} is still answering: wait, or cancel it.", code="session_busy"
            )
        session.busy = True
        return session

    def close(self, client: str, session_id: int, session: Session, keep: bool) -> None:
        """End of a turn. The session stays only where `keep` says so and there is something to keep."""
        session.busy, session.run, session.last_used = False, None, time.monotonic()
        key = (client, session_id)
        if self._sessions.get(key) is session:
            if keep and session.messages:
                self._sessions.move_to_end(key)
            else:
                del self._sessions[key]

    def find(self, client: str, session_id: int) -> Session | None:
        return self._sessions.get((client, session_id))

    def end(self, client: str, session_id: int) -> None:
        """Drop a session as its client wishes, and stop its answer, if it has one."""
        session = self._sessions.pop((client, session_id), None)
        if session and session.run:
            session.run.stop()
        ids = self._forgotten.get(client, OrderedDict())
        ids.pop(session_id, None)
        if not ids:
            self._forgotten.pop(client, None)

    def _make_room(self, client: str) -> None:
        """Forget a session for a new one: the client's own oldest where it has its share, else one of whoever has the most."""
        counts = Counter(owner for owner, _ in self._sessions)
        if counts[client] >= self._limits.sessions_per_client:
            self._forget_oldest([client])
        elif len(self._sessions) >= self._limits.sessions:
            self._forget_oldest([owner for owner, _ in counts.most_common()])

    def _forget_oldest(self, owners: list[str]) -> None:
        """Forget the oldest idle session of the first of `owners` that has one."""
        for wanted in owners:
            for key, session in self._sessions.items():
                if key[0] == wanted and not session.busy:
                    self._forget(key)
                    return
        raise ApiError(429, "All sessions are busy.", code="sessions_full", headers={"Retry-After": "5"})

    def _forget(self, key: Key) -> None:
        client, session_id = key
        del self._sessions[key]
        ids = self._forgotten.setdefault(client, OrderedDict())
        ids[session_id] = None
        ids.move_to_end(session_id)
        if len(ids) > self._limits.forgotten_sessions:
            ids.popitem(last=False)
        self._forgotten.move_to_end(client)
        if len(self._forgotten) > self._limits.forgotten_sessions:
            self._forgotten.popitem(last=False)

    def _forget_idle(self) -> None:
        oldest = time.monotonic() - self._limits.session_idle_s
        for key in [k for k, s in self._sessions.items() if not s.busy and s.last_used < oldest]:
            self._forget(key)
