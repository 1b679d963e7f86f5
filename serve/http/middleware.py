"""What every request passes before a route sees it: log, size of headers, Host and Origin, key, size and time of the body.

One plain ASGI layer. It hands on a body that is complete, within its limits and marked as JSON, and a request id.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.config import ServeConfig
from serve.http.auth import OPEN_PATHS, KeyCheck, check_origin
from serve.http.errors import ApiError

log = logging.getLogger("tmq.serve")


def escaped(text: str) -> str:
    """`text` on one line of printable ASCII, so that a request cannot forge or colour a log line."""
    return text.encode("unicode_escape").decode("ascii")


class Gate:
    """The outer layer of the app. `observe(path, status, seconds)` is told of each answer."""

    def __init__(self, app: ASGIApp, config: ServeConfig, observe: Callable[[str, int, float], None]) -> None:
        self._app, self._config, self._observe = app, config, observe
        self._keys = KeyCheck(config.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.monotonic(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            try:
                receive = await self._check(scope, receive)
            except ApiError as error:
                response = error.response()
                response.headers["connection"] = "close"  # what is left of the body will not be read
                await response(scope, receive, send_and_note)
            else:
                await self._app(scope, receive, send_and_note)
        finally:
            elapsed_s = time.monotonic() - start
            route = scope.get("route")
            self._observe(getattr(route, "path", "other"), status, elapsed_s)
            log.info(
                "%s %s %s -> %s in %.0f ms, request %s",
                escaped(str((scope.get("client") or ("-",))[0])),
                escaped(scope["method"]),
                escaped(scope["path"]),
                status or "no answer",
                1e3 * elapsed_s,
                request_id,
            )

    async def _check(self, scope: Scope, receive: Receive) -> Receive:
        """Raise ApiError, or give a `receive` that yields the whole body at once."""
        headers, limits = Headers(scope=scope), self._config.limits
        if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > limits.header_bytes:
            raise ApiError(
                431, f"The headers are larger than {limits.header_bytes} bytes.", code="headers_too_large"
            )
        check_origin(headers, self._config.is_loopback, self._config.allow_origins)
        client = str((scope.get("client") or ("",))[0])
        preflight = scope["method"] == "OPTIONS" and self._config.allow_origins
        if self._keys.is_on and scope["path"] not in OPEN_PATHS and not preflight:
            client = self._keys.client(headers.get("authorization", ""))
        scope["state"]["client"] = client
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(
                415, "Compressed bodies are not accepted: send the JSON as it is.", code="encoding_refused"
            )
        try:
            body = await asyncio.wait_for(self._body(headers, receive), limits.body_s)
        except asyncio.TimeoutError as e:
            raise ApiError(
                408, f"The body did not arrive within {limits.body_s:g} s.", code="body_timeout"
            ) from e
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind != "application/json":
            raise ApiError(415, "Expected a JSON body with the header 'Content-Type: application/json'.")
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        limit = self._config.limits.body_bytes
        too_large = ApiError(
            413,
            f"The body is larger than {limit} bytes.",
            code="body_too_large",
            headers={"Connection": "close"},
        )
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
            raise too_large
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "The connection ended inside the body.")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(chunks)
