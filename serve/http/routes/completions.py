"""POST /v1/completions."""

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve.http.disconnect import while_connected
from serve.http.errors import unsupported
from serve.http.generation.answers import SSE_DONE, Gathered, TextCompletion, sse, text_logprobs, usage
from serve.http.generation.runs import Run
from serve.http.generation.streams import RunStream, answer_whole
from serve.http.protocol.chat import CompletionRequest
from serve.http.routes.json_route import JsonRoute, errors
from serve.http.service import Service

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


def completion_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    async def start(body: CompletionRequest, request: Request) -> Run:
        service.check_model(body.model)
        service.check_tokens(body)
        for name in ("echo", "prompt_logprobs", "response_format"):
            if getattr(body, name):
                raise unsupported(name)
        if body.max_tokens == 0:
            raise unsupported("max_tokens")
        prompts = [
            await service.prompts.of_text(prompt, None, request.state.client) for prompt in body.prompts()
        ]
        longest = max(map(len, prompts)) if all(prompts) else 0
        max_tokens = service.prompts.room(longest, body.max_tokens, "prompt", _DEFAULT_MAX_TOKENS)
        sampling = body.sampling(max_tokens, body.logprobs)
        return service.runs.start(
            prompts, sampling, body.count, request.state.request_id, request.state.client
        )

    async def chunks(run: Run, body: CompletionRequest, head: dict[str, Any]) -> AsyncIterator[bytes]:
        lengths: dict[int, int] = {}  # characters that each choice has sent
        async for index, event in run:
            if not (event.text or event.logprobs or event.finish_reason):
                continue
            offset = lengths.get(index, 0)
            lengths[index] = offset + len(event.text)
            choice = {
                "index": index,
                "text": event.text,
                "logprobs": text_logprobs(event.logprobs, offset) if body.logprobs is not None else None,
                "finish_reason": event.finish_reason,
            }
            yield sse({**head, "choices": [choice]})
        if body.wants_usage:
            prompt_tokens = run.prompt_tokens // (body.count)
            yield sse({**head, "choices": [], "usage": usage(prompt_tokens, run.completion_tokens)})
        yield SSE_DONE

    async def whole(run: Run, body: CompletionRequest, head: dict[str, Any]) -> Response:
        choices = [Gathered() for _ in range(run.size)]
        async for index, event in run:
            choices[index].add(event)
        return JSONResponse(
            {
                **head,
                "choices": [
                    {
                        "index": index,
                        "text": choice.text,
                        "logprobs": text_logprobs(choice.logprobs) if body.logprobs is not None else None,
                        "finish_reason": choice.finish_reason,
                    }
                    for index, choice in enumerate(choices)
                ],
                "usage": usage(run.prompt_tokens // (body.count), run.completion_tokens),
            }
        )

    @router.post(
        "/v1/completions",
        response_model=None,
        responses={200: {"model": TextCompletion}, **errors(400, 404, 429, 500, 503, 504)},
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """The continuation of a text or of token ids; `stream: true` sends it in pieces as server-sent events."""
        head: dict[str, Any] = {
            "id": f"cmpl-{request.state.request_id}",
            "object": "text_completion",
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
