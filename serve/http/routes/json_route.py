"""The route class of all JSON endpoints, and the errors that OpenAPI lists for them."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from serve.http.errors import ApiError
from serve.http.generation.answers import ErrorBody


class StrictRequest(Request):
    """A request whose JSON is UTF-8 without lone surrogates, NaN, Infinity or deep nesting."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as e:
            # The parser's message names a position and a kind of mistake, nothing of the process.
            raise ApiError(400, f"The body is not valid JSON: {e}.", code="invalid_json") from e


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle


_ERRORS = {
    400: "The request is at fault; the message names the field.",
    401: "A key is needed.",
    403: "Host or Origin refused.",
    404: "No such model, or a session that was forgotten.",
    408: "The body came too slowly.",
    409: "The session is busy.",
    413: "The body is too large.",
    415: "Not JSON.",
    429: "The queue is full; see Retry-After.",
    431: "The headers are too large.",
    500: "The engine failed this request.",
    503: "The engine is gone, or the server is ending.",
    504: "Not finished in time.",
}


# Of endpoints that answer whole or as server-sent events.
STREAMED: dict[str, Any] = {"content": {"application/json": {}, "text/event-stream": {}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for error answers; those that the outer layer gives are always among them."""
    always = (401, 403, 408, 413, 415, 431)
    return {s: {"model": ErrorBody, "description": _ERRORS[s]} for s in sorted({*always, *statuses})}
