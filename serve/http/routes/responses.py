"""POST /v1/responses."""

import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve.http.disconnect import while_connected
from serve.http.errors import ApiError
from serve.http.generation.conversation import Talk, Turn, start_turn
from serve.http.generation.streams import RunStream, answer_whole
from serve.http.protocol.responses import ResponsesRequest
from serve.http.routes.json_route import STREAMED, JsonRoute, errors
from serve.http.service import Service
from serve.prompts.tool_formats import Call, Piece


class _Answer:
    """A response as it grows: its items, and the events that tell of each change."""

    def __init__(self, body: ResponsesRequest, request_id: str, model: str) -> None:
        self._body, self._id, self._model = body, request_id, model
        self._created = int(time.time())
        self._items: list[dict[str, Any]] = []
        self._number = -1  # of the last event
        self._message: dict[str, Any] | None = None  # the item that text goes to

    def object(self, status: str, turn: Turn | None = None, error: ApiError | None = None) -> dict[str, Any]:
        body, run = self._body, None if turn is None else turn.run
        form = body.text.format if body.text else None
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": 0.7 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True)},
            "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else "auto",
            "tools": [tool.model_dump() for tool in body.tools or []],
            "top_p": body.top_p or 1.0,
            "truncation": "disabled",
            "usage": None
            if run is None or status in ("in_progress", "failed")
            else {
                "input_tokens": run.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": run.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": run.prompt_tokens + run.completion_tokens,
            },
            "user": None,
            "metadata": body.metadata or {},
        }

    def event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        data = {"type": kind, "sequence_number": self._number, **fields}
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        return f"event: {kind}\ndata: {text}\n\n".encode()

    def take(self, piece: Piece) -> Iterator[bytes]:
        """Add a part of the answer; the events of it."""
        if piece.text:
            if self._message is None:
                yield from self._open_message()
            yield from self._add_text(piece.text)
        for call in piece.calls:
            yield from self.close_message()
            yield from self._add_call(call)

    def close_message(self, status: str = "completed") -> Iterator[bytes]:
        message, self._message = self._message, None
        if message is None:
            return
        part = message["content"][0]
        message["status"] = status
        where: dict[str, Any] = {**self._where(message), "content_index": 0}
        yield self.event("response.output_text.done", **where, text=part["text"], logprobs=[])
        yield self.event("response.content_part.done", **where, part=part)
        yield self.event("response.output_item.done", output_index=where["output_index"], item=message)

    def _where(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": self._items.index(item)}

    def _open_message(self) -> Iterator[bytes]:
        item: dict[str, Any] = {
            "id": f"msg_{self._id}_{len(self._items)}",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self._message = item
        self._items.append(item)
        yield self.event("response.output_item.added", output_index=len(self._items) - 1, item=item)
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"] = [part]
        yield self.event("response.content_part.added", **self._where(item), content_index=0, part=part)

    def _add_text(self, text: str) -> Iterator[bytes]:
        assert self._message is not None
        self._message["content"][0]["text"] += text
        where = self._where(self._message)
        yield self.event("response.output_text.delta", **where, content_index=0, delta=text, logprobs=[])

    def _add_call(self, call: Call) -> Iterator[bytes]:
        item: dict[str, Any] = {
            "id": f"fc_{self._id}_{len(self._items)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        self._items.append(item)
        where = self._where(item)
        yield self.event("response.output_item.added", output_index=where["output_index"], item=item)
        yield self.event("response.function_call_arguments.delta", **where, delta=call.arguments)
        done = "response.function_call_arguments.done"
        yield self.event(done, **where, name=call.name, arguments=call.arguments)
        item |= {"arguments": call.arguments, "status": "completed"}
        yield self.event("response.output_item.done", output_index=where["output_index"], item=item)


def _status(finish_reason: str | None) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


def response_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    async def start(body: ResponsesRequest, request: Request) -> Turn:
        service.check_model(body.model)
        talk = Talk(
            body.messages(),
            body.chat_tools(),
            body.choice(),
            body.variables(),
            body.response_format(),
            body.max_output_tokens,
            1,
            body.parallel_tool_calls is False,
            ("input", "text.format"),
        )
        return await start_turn(service, request, talk, body.sampling)

    async def events(turn: Turn, answer: _Answer) -> AsyncIterator[bytes]:
        yield answer.event("response.created", response=answer.object("in_progress"))
        yield answer.event("response.in_progress", response=answer.object("in_progress"))
        reader = turn.reader()
        async for _, event in turn.run:
            for line in answer.take(reader.read(event)):
                yield line
        status = _status(reader.finish_reason)
        for line in answer.close_message(status):
            yield line
        yield answer.event(f"response.{status}", response=answer.object(status, turn))

    async def whole(turn: Turn, answer: _Answer) -> Response:
        reader = turn.reader()
        async for _, event in turn.run:
            list(answer.take(reader.read(event)))
        status = _status(reader.finish_reason)
        list(answer.close_message(status))
        return JSONResponse(answer.object(status, turn))

    @router.post(
        "/v1/responses",
        response_model=None,
        responses={200: STREAMED, **errors(400, 404, 429, 500, 503, 504)},
    )
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """An answer to a text or a conversation, with tools; `stream: true` sends it as OpenAI's typed events.

        Nothing is stored: previous_response_id is refused, and a conversation comes whole in `input`.
        """
        answer = _Answer(body, request.state.request_id, service.model_name)
        if not body.stream:
            return await answer_whole(
                request, lambda: start(body, request), lambda turn: whole(turn, answer), service.delivery_s
            )
        turn = await while_connected(request.receive, start(body, request), service.delivery_s)

        def failed(error: ApiError) -> bytes:
            return answer.event("response.failed", response=answer.object("failed", None, error))

        return RunStream(turn.run, events(turn, answer), failed, service.delivery_s)

    return router
