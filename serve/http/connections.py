"""How connections behave at their ends: uvicorn's h11 protocol with a time limit for headers and one for clients that do not read.

uvicorn itself waits for ever for the rest of a request line, and for a client to take its answer. h11 is chosen because only it
bounds the size of headers.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.http.disconnect import ABORT
from serve.http.errors import ApiError

_READ_BYTES_PER_S = 1024  # the least that a client which is behind must read


def limited_protocol(header_s: float, stall_s: float) -> type[asyncio.Protocol]:
    """A protocol class that closes a connection whose next request does not arrive whole within `header_s` seconds, or whose
    client, once it is behind, reads less than 1 KiB a second for `stall_s` seconds."""

    class LimitedProtocol(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None
        _stall_timer: asyncio.TimerHandle | None = None
        _behind = 0  # bytes that waited for the client when last looked at

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            app = self.app

            async def abortable(scope: Any, receive: Any, send: Any) -> None:
                scope.setdefault("extensions", {})[ABORT] = transport.abort
                await app(scope, receive, send)

            self.app = abortable
            self._arm()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_reader()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._unwatch_reader()

        def _watch_reader(self) -> None:
            self._behind = self.transport.get_write_buffer_size()
            self._stall_timer = self.loop.call_later(stall_s, self._judge_reader)

        def _unwatch_reader(self) -> None:
            if self._stall_timer is not None:
                self._stall_timer.cancel()
                self._stall_timer = None

        def _judge_reader(self) -> None:
            read = self._behind - self.transport.get_write_buffer_size()
            if read < stall_s * _READ_BYTES_PER_S:
                self.transport.abort()
            else:
                self._watch_reader()

        def data_received(self, data: bytes) -> None:
            if self._is_between_requests:
                self._arm()
            super().data_received(data)
            if not self._is_between_requests:
                self._disarm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            self._unwatch_reader()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            error = ApiError(
                400, "This is not a valid HTTP request, or its headers are too large.", code="bad_http"
            )
            body = json.dumps(error.body).encode()
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                headers = [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode()),
                    (b"connection", b"close"),
                ]
                for event in (
                    h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                    h11.Data(data=body),
                    h11.EndOfMessage(),
                ):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        @property
        def _is_between_requests(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _arm(self) -> None:
            if self._header_timer is None:
                self._header_timer = self.loop.call_later(header_s, self._give_up)

        def _disarm(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _give_up(self) -> None:
            self._header_timer = None
            if self._is_between_requests and not self.transport.is_closing():
                self.transport.close()

    return LimitedProtocol
