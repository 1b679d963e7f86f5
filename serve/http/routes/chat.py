"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve.http.disconnect import while_connected
from serve.http.errors import ApiError, unsupported
from serve.http.generation.answers import SSE_DONE, ChatCompletion, Gathered, chat_logprobs, sse, usage
from serve.http.generation.runs import Run
from serve.http.generation.streams import RunStream, answer_whole
from serve.http.protocol.chat import ChatRequest, TemplateKwargs
from serve.http.protocol.messages import ResponseFormat
from serve.http.routes.json_route import JsonRoute, errors
from serve.http.service import Service


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    async def start(body: ChatRequest, request: Request) -> Run:
        service.check_model(body.model)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(
                400, "top_logprobs needs logprobs: true.", param="top_logprobs", code="invalid_value"
            )
        service.check_tokens(body)
        for name in ("tools", "response_format", "chat_template_kwargs", "enable_thinking"):
            asked = getattr(body, name)
            if asked and asked != ResponseFormat(type="text") and asked != TemplateKwargs():
                raise unsupported(name)
        if body.reasoning_effort not in (None, "none"):
            raise unsupported("reasoning_effort")
        ids = await service.prompts.of_chat(body.conversation(), request.state.client)
        max_tokens = service.prompts.room(len(ids), body.max_completion_tokens or body.max_tokens, "messages")
        sampling = body.sampling(max_tokens, (body.top_logprobs or 0) if body.logprobs else None)
        return service.runs.start([ids], sampling, body.count, request.state.request_id, request.state.client)

    async def chunks(run: Run, body: ChatRequest, head: dict[str, Any]) -> AsyncIterator[bytes]:
        def chunk(
            index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
        ) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return sse({**head, "choices": [choice]})

        for index in range(body.count):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, event in run:
            if event.text or event.logprobs:
                yield chunk(
                    index,
                    {"content": event.text},
                    chat_logprobs(event.logprobs) if body.logprobs else None,
                )
            if event.finish_reason:
                yield chunk(index, {}, None, event.finish_reason)
        if body.wants_usage:
            # Each of the n sequences counts the prompt; a client pays it once.
            prompt_tokens = run.prompt_tokens // (body.count)
            yield sse({**head, "choices": [], "usage": usage(prompt_tokens, run.completion_tokens)})
        yield SSE_DONE

    async def whole(run: Run, body: ChatRequest, head: dict[str, Any]) -> Response:
        choices = [Gathered() for _ in range(body.count)]
        async for index, event in run:
            choices[index].add(event)
        return JSONResponse(
            {
                **head,
                "choices": [
                    {
                        "index": index,
                        "message": {"role": "assistant", "content": choice.text},
                        "logprobs": chat_logprobs(choice.logprobs) if body.logprobs else None,
                        "finish_reason": choice.finish_reason,
                    }
                    for index, choice in enumerate(choices)
                ],
                "usage": usage(run.prompt_tokens // (body.count), run.completion_tokens),
            }
        )

    @router.post(
        "/v1/chat/completions",
        response_model=None,
        responses={200: {"model": ChatCompletion}, **errors(400, 404, 429, 500, 503, 504)},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """An answer to a conversation; `stream: true` sends it in pieces as server-sent events."""
        head: dict[str, Any] = {
            "id": f"chatcmpl-{request.state.request_id}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": service.model_name,
        }

        if not body.stream:
            return await answer_whole(
                request, lambda: start(body, request), lambda run: whole(run, body, head), service.delivery_s
            )
        run = await while_connected(request.receive, start(body, request), service.delivery_s)
        return RunStream(run, chunks(run, body, head), lambda e: sse(e.body), service.delivery_s)

    return router
