"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve.http.disconnect import while_connected
from serve.http.errors import ApiError
from serve.http.generation.answers import SSE_DONE, ChatCompletion, Gathered, chat_logprobs, sse, usage
from serve.http.generation.conversation import Talk, Turn, start_turn
from serve.http.generation.streams import RunStream, answer_whole
from serve.http.protocol.chat import ChatRequest
from serve.http.routes.json_route import STREAMED, JsonRoute, errors
from serve.http.service import Service
from serve.prompts.tool_formats import Call


def _written(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


async def _chunks(turn: Turn, body: ChatRequest, head: dict[str, Any]) -> AsyncIterator[bytes]:
    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return sse({**head, "choices": [choice]})

    run, readers = turn.run, [turn.reader() for _ in range(body.count)]
    calls = [0] * body.count
    for index in range(body.count):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, event in run:
        piece = readers[index].read(event)
        if piece.text or event.logprobs:
            logprobs = chat_logprobs(event.logprobs) if body.logprobs else None
            yield chunk(index, {"content": piece.text}, logprobs)
        for call in piece.calls:
            yield chunk(index, {"tool_calls": [{"index": calls[index], **_written(call)}]})
            calls[index] += 1
        if event.finish_reason:
            yield chunk(index, {}, None, readers[index].finish_reason)
    if body.wants_usage:
        # Each of the n sequences counts the prompt; a client pays it once.
        prompt_tokens = run.prompt_tokens // body.count
        yield sse({**head, "choices": [], "usage": usage(prompt_tokens, run.completion_tokens)})
    yield SSE_DONE


async def _whole(turn: Turn, body: ChatRequest, head: dict[str, Any]) -> Response:
    run, readers = turn.run, [turn.reader() for _ in range(body.count)]
    choices = [Gathered() for _ in range(body.count)]
    calls: list[list[Call]] = [[] for _ in range(body.count)]
    texts = [""] * body.count
    async for index, event in run:
        choices[index].add(event)
        piece = readers[index].read(event)
        texts[index] += piece.text
        calls[index] += piece.calls

    def message(index: int) -> dict[str, Any]:
        said = {"role": "assistant", "content": texts[index]}
        if calls[index]:
            written = [_written(call) for call in calls[index]]
            return {**said, "content": texts[index] or None, "tool_calls": written}
        return said

    return JSONResponse(
        {
            **head,
            "choices": [
                {
                    "index": index,
                    "message": message(index),
                    "logprobs": chat_logprobs(choice.logprobs) if body.logprobs else None,
                    "finish_reason": readers[index].finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage(run.prompt_tokens // body.count, run.completion_tokens),
        }
    )


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    async def start(body: ChatRequest, request: Request) -> Turn:
        service.check_model(body.model)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(
                400, "top_logprobs needs logprobs: true.", param="top_logprobs", code="invalid_value"
            )
        service.check_tokens(body)
        talk = Talk(
            body.conversation(),
            body.tools or [],
            body.tool_choice,
            body.template_variables(),
            body.response_format,
            body.max_completion_tokens or body.max_tokens,
            body.count,
            body.parallel_tool_calls is False,
        )
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await start_turn(
            service, request, talk, lambda most, schema: body.sampling(most, logprobs, json_schema=schema)
        )

    @router.post(
        "/v1/chat/completions",
        response_model=None,
        responses={200: {"model": ChatCompletion, **STREAMED}, **errors(400, 404, 429, 500, 503, 504)},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """An answer to a conversation; `stream: true` sends it in pieces as server-sent events.

        `response_format` binds the answer to JSON; `tools` are given to the model by its own template, and its calls are read where
        the way it writes them is known.
        """
        head: dict[str, Any] = {
            "id": f"chatcmpl-{request.state.request_id}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": service.model_name,
        }
        if not body.stream:
            return await answer_whole(
                request,
                lambda: start(body, request),
                lambda turn: _whole(turn, body, head),
                service.delivery_s,
            )
        turn = await while_connected(request.receive, start(body, request), service.delivery_s)
        return RunStream(turn.run, _chunks(turn, body, head), lambda e: sse(e.body), service.delivery_s)

    return router
