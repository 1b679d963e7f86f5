"""Bodies of answers in OpenAI's shape, whole and streamed. Pure functions of events; TypedDicts are for OpenAPI."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict

from engine.api import Event, TokenLogprob

_MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: str


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str


class TextCompletion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(TypedDict):
    tokens: list[int]
    count: int
    max_model_len: int


class Health(TypedDict):
    status: Literal["ok"]
    model: str
    running: int
    waiting: int
    blocks_free: int
    blocks_total: int


class Turn(TypedDict):
    """Answer of /v1/chat/interactive. `tokens` generated so far, `history_tokens` before this turn."""

    text: str
    tokens: int
    input_tokens: int
    history_tokens: int
    finish_reason: str | None


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorDetail


class Gathered:
    """One sequence's events, added up."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason = ""

    def add(self, event: Event) -> None:
        self.texts.append(event.text)
        self.logprobs.extend(event.logprobs)
        self.finish_reason = event.finish_reason or ""

    @property
    def text(self) -> str:
        return "".join(self.texts)


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _chat_token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": list(text.encode())}


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""
    return {
        "content": [
            _chat_token(t.text, t.logprob) | {"top_logprobs": [_chat_token(text, p) for _, text, p in t.top]}
            for t in tokens
        ],
        "refusal": None,
    }


def text_logprobs(tokens: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
    """The `logprobs` object of a completion choice. `offset`: characters of the text before `tokens`."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [t.text for t in tokens],
        "token_logprobs": [max(t.logprob, _MIN_LOGPROB) for t in tokens],
        "top_logprobs": [{text: max(p, _MIN_LOGPROB) for _, text, p in t.top} for t in tokens],
        "text_offset": offsets,
    }


def sse(body: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"
