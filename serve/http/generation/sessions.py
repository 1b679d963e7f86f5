"""Conversations that the server keeps for /v1/chat/interactive: bounded in number, forgotten when idle, one per client and id."""

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from serve.http.errors import ApiError
from serve.http.generation.runs import Run
from serve.http.limits import Limits


@dataclass(eq=False)
class Session:
    """Messages so far and their length in tokens. `busy` while a turn is answered; `run` is that answer."""

    messages: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0
    busy: bool = False
    run: Run | None = None
    last_used: float = field(default_factory=time.monotonic)


class Sessions:
    """Sessions by (client, id): one client never sees another's, as far as keys or addresses tell them apart."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sessions: OrderedDict[tuple[str, int], Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, client: str, session_id: int) -> Session:
        """The session, made where it is new, marked busy. Raises ApiError 409 while another turn runs, 429 if all are busy."""
        self._forget()
        key = (client, session_id)
        session = self._sessions.get(key)
        if session is None:
            if len(self._sessions) >= self._limits.sessions:
                idle = next((k for k, s in self._sessions.items() if not s.busy), None)
                if idle is None:
                    raise ApiError(
                        429, "All sessions are busy.", code="sessions_full", headers={"Retry-After": "5"}
                    )
                del self._sessions[idle]
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
        """Forget a session and stop its answer, if it has one."""
        session = self._sessions.pop((client, session_id), None)
        if session and session.run:
            session.run.stop()

    def _forget(self) -> None:
        oldest = time.monotonic() - self._limits.session_idle_s
        for key in [k for k, s in self._sessions.items() if not s.busy and s.last_used < oldest]:
            del self._sessions[key]
