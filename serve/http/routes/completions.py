"""POST /v1/completions."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from engine.api import Event, TokenLogprob
from serve.http.disconnect import while_connected
from serve.http.errors import ApiError
from serve.http.generation.answers import SSE_DONE, Gathered, TextCompletion, sse, usage
from serve.http.generation.runs import Run
from serve.http.generation.scores import Echo, prompt_scores, text_logprobs
from serve.http.generation.streams import RunStream, answer_whole
from serve.http.protocol.chat import CompletionRequest
from serve.http.routes.json_route import STREAMED, JsonRoute, errors
from serve.http.service import Service
from serve.limits import MAX_SCORES

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class _Asked:
    """A request on its way: its run, and for each prompt what an echo says."""

    run: Run
    body: CompletionRequest
    echoes: list[Echo]

    def text(self, index: int, event_text: str, first: bool) -> str:
        return self._echo(index).text + event_text if first else event_text

    def logprobs(
        self, index: int, tokens: list[TokenLogprob], prompt: list[TokenLogprob], offset: int, first: bool
    ) -> Any:
        """The `logprobs` object: with an echo, the first one begins with the tokens of the prompt."""
        if self.body.logprobs is None:
            return None
        count = self.body.logprobs
        echo = self._echo(index) if first and self.body.echo else None
        return text_logprobs(tokens, offset, count, echo, prompt)

    def _echo(self, index: int) -> Echo:
        return self.echoes[index // self.body.count]


def completion_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    async def echo_of(prompt: str | list[int], ids: list[int], body: CompletionRequest) -> Echo:
        if not body.echo:
            return Echo()
        if body.logprobs is None and isinstance(prompt, str):
            return Echo(prompt)
        return Echo.of(prompt, await service.prompts.pieces(ids))

    async def start(body: CompletionRequest, request: Request) -> _Asked:
        service.check_model(body.model)
        service.check_tokens(body)
        add_bos, client = False if body.add_special_tokens is False else None, request.state.client
        given = body.prompts()
        prompts = [await service.prompts.of_text(prompt, add_bos, client) for prompt in given]
        longest = max(map(len, prompts)) if all(prompts) else 0
        max_tokens = service.prompts.room(longest, body.max_tokens, "prompt", _DEFAULT_MAX_TOKENS)
        scores = body.prompt_scores
        if scores is not None and sum(map(len, prompts)) * (scores + 1) > MAX_SCORES:
            raise ApiError(
                400,
                f"{sum(map(len, prompts))} tokens of prompt with {scores} alternatives each are more log-probabilities than "
                f"the {MAX_SCORES} of one request: ask for fewer alternatives, or send fewer prompts.",
                param="prompt_logprobs" if body.prompt_logprobs is not None else "logprobs",
                code="invalid_value",
            )
        schema = await service.schema(body.response_format, client, "response_format")
        sampling = body.sampling(max_tokens, body.logprobs, prompt_logprobs=scores, json_schema=schema)
        echoes = [await echo_of(prompt, ids, body) for prompt, ids in zip(given, prompts, strict=True)]
        run = service.runs.start(prompts, sampling, body.count, request.state.request_id, client)
        return _Asked(run, body, echoes)

    def scored(body: CompletionRequest, prompt: list[TokenLogprob]) -> dict[str, Any]:
        return {} if body.prompt_logprobs is None else {"prompt_logprobs": prompt_scores(prompt)}

    async def chunks(asked: _Asked, head: dict[str, Any]) -> AsyncIterator[bytes]:
        run, body = asked.run, asked.body
        lengths: dict[int, int] = {}  # characters that each choice has sent

        def is_news(index: int, event: Event) -> bool:
            return bool(event.text or event.logprobs or event.finish_reason or event.prompt_logprobs)

        async for index, event in run:
            if not is_news(index, event):
                continue
            first, offset = index not in lengths, lengths.get(index, 0)
            text = asked.text(index, event.text, first)
            lengths[index] = offset + len(text)
            prompt = list(event.prompt_logprobs)
            choice = {
                "index": index,
                "text": text,
                "logprobs": asked.logprobs(index, list(event.logprobs), prompt, offset, first),
                "finish_reason": event.finish_reason,
                **(scored(body, prompt) if first else {}),
            }
            yield sse({**head, "choices": [choice]})
        if body.wants_usage:
            prompt_tokens = run.prompt_tokens // body.count
            yield sse({**head, "choices": [], "usage": usage(prompt_tokens, run.completion_tokens)})
        yield SSE_DONE

    async def whole(asked: _Asked, head: dict[str, Any]) -> Response:
        run, body = asked.run, asked.body
        choices = [Gathered() for _ in range(run.size)]
        async for index, event in run:
            choices[index].add(event)
        return JSONResponse(
            {
                **head,
                "choices": [
                    {
                        "index": index,
                        "text": asked.text(index, choice.text, True),
                        "logprobs": asked.logprobs(index, choice.logprobs, choice.prompt_logprobs, 0, True),
                        "finish_reason": choice.finish_reason,
                        **scored(body, choice.prompt_logprobs),
                    }
                    for index, choice in enumerate(choices)
                ],
                "usage": usage(run.prompt_tokens // body.count, run.completion_tokens),
            }
        )

    @router.post(
        "/v1/completions",
        response_model=None,
        responses={200: {"model": TextCompletion, **STREAMED}, **errors(400, 404, 429, 500, 503, 504)},
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """The continuation of a text or of token ids; `stream: true` sends it in pieces as server-sent events.

        `echo: true` puts the prompt before it, with `logprobs` also how likely the model finds each of its tokens.
        """
        head: dict[str, Any] = {
            "id": f"cmpl-{request.state.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }
        if not body.stream:
            return await answer_whole(
                request, lambda: start(body, request), lambda asked: whole(asked, head), service.delivery_s
            )
        asked = await while_connected(request.receive, start(body, request), service.delivery_s)
        return RunStream(asked.run, chunks(asked, head), lambda e: sse(e.body), service.delivery_s)

    return router
