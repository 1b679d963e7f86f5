"""POST /v1/chat/interactive: LMDeploy's endpoint whose conversations live on the server. Streams JSON lines."""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from engine.api import SamplingParams
from serve.http.disconnect import while_connected
from serve.http.errors import ApiError
from serve.http.generation.answers import Gathered, Turn
from serve.http.generation.runs import Run
from serve.http.generation.sessions import Session
from serve.http.generation.streams import RunStream, answer_whole
from serve.http.protocol.lmdeploy import InteractiveRequest
from serve.http.routes.json_route import JsonRoute, errors
from serve.http.service import Service

_DEFAULT_OUTPUT_LEN = 512  # these defaults are LMDeploy's
_TEMPERATURE, _TOP_P, _TOP_K = 0.8, 0.8, 40


def _line(turn: Turn | dict[str, Any]) -> bytes:
    return json.dumps(turn, ensure_ascii=False).encode() + b"\n"


class _Turn:
    """One question and its answer within a session; the session learns of it only if the answer is complete."""

    def __init__(self, service: Service, body: InteractiveRequest, request: Request) -> None:
        self._service, self._body, self._request = service, body, request
        self._client = request.state.client
        self._id = -1 if body.session_id is None else body.session_id
        # -1 is "no session" in LMDeploy: nothing to come back to, so nothing is kept.
        self._session = (
            Session(busy=True) if self._id == -1 else service.sessions.open(self._client, self._id)
        )
        self._history = self._session.tokens
        self._messages = [*self._session.messages, *body.turn()]
        self._prompt_tokens = 0
        self._open = True

    async def start(self) -> Run:
        body, prompts = self._body, self._service.prompts
        if not body.turn():
            raise ApiError(400, "prompt: the prompt is empty.", param="prompt", code="empty_prompt")
        ids = await prompts.of_chat(self._messages, self._client, param="prompt")
        self._prompt_tokens = len(ids)
        length = prompts.room(len(ids), body.request_output_len, "prompt", _DEFAULT_OUTPUT_LEN)
        sampling = SamplingParams(**body.chosen(length, _TEMPERATURE, _TOP_P, _TOP_K))
        run = self._service.runs.start([ids], sampling, 1, self._request.state.request_id, self._client)
        self._session.run = run
        return run

    def body(self, text: str, tokens: int, finish_reason: str | None) -> Turn:
        return {
            "text": text,
            "tokens": tokens,
            "input_tokens": max(self._prompt_tokens - self._history, 0),
            "history_tokens": self._history,
            "finish_reason": finish_reason,
        }

    def end(self, answer: Gathered | None, tokens: int = 0) -> None:
        """Close the turn: with `answer` it becomes part of the session, without it was as if never asked."""
        if not self._open:
            return
        self._open = False
        if answer is not None:
            self._session.messages = [*self._messages, {"role": "assistant", "content": answer.text}]
            self._session.tokens = self._prompt_tokens + tokens
        if self._id != -1:
            keep = bool(self._body.interactive_mode) or answer is None
            self._service.sessions.close(self._client, self._id, self._session, keep)

    async def lines(self, run: Run) -> AsyncIterator[bytes]:
        answer, tokens = Gathered(), 0
        async for _, event in run:
            answer.add(event)
            tokens += len(event.token_ids)
            if event.finish_reason:
                self.end(answer, tokens)
            if event.text or event.finish_reason:
                yield _line(self.body(event.text, tokens, event.finish_reason))

    async def whole(self, run: Run) -> Response:
        answer = Gathered()
        async for _, event in run:
            answer.add(event)
        self.end(answer, run.completion_tokens)
        return JSONResponse(self.body(answer.text, run.completion_tokens, answer.finish_reason))


class _TurnStream(RunStream):
    """Undoes the turn where the stream ends before the answer does."""

    turn: _Turn

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.turn.end(None)


def interactive_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["LMDeploy"])

    @router.post(
        "/v1/chat/interactive",
        response_model=None,
        responses={200: {"model": Turn}, **errors(400, 404, 409, 429, 500, 503, 504)},
    )
    async def chat_interactive(body: InteractiveRequest, request: Request) -> Response:
        """A turn of a conversation kept under `session_id` while `interactive_mode` is true.

        An empty prompt with `request_output_len: 0` ends the session, `cancel: true` stops its running answer.
        """
        session_id = -1 if body.session_id is None else body.session_id
        nothing: Turn = {
            "text": "",
            "tokens": 0,
            "input_tokens": 0,
            "history_tokens": 0,
            "finish_reason": None,
        }
        if body.cancel:
            session = service.sessions.find(request.state.client, session_id)
            if session and session.run:
                session.run.stop()
            return JSONResponse(nothing)
        if body.request_output_len == 0:
            if body.turn():
                raise ApiError(
                    400,
                    "request_output_len: 0 ends a session and goes with an empty prompt; ask for 1 token at least.",
                    param="request_output_len",
                    code="invalid_value",
                )
            service.sessions.end(request.state.client, session_id)
            return JSONResponse(nothing)
        turn = _Turn(service, body, request)
        try:
            if not body.stream:
                return await answer_whole(request, turn.start, turn.whole, service.delivery_s)
            run = await while_connected(request.receive, turn.start(), service.delivery_s)
        except BaseException:
            turn.end(None)
            raise

        def failed(error: ApiError) -> bytes:
            return _line({**turn.body("", 0, "error"), **error.body})

        stream = _TurnStream(run, turn.lines(run), failed, service.delivery_s, "application/x-ndjson")
        stream.turn = turn
        return stream

    return router
