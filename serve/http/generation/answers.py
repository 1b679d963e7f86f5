"""Bodies of answers in OpenAI's shape, whole and streamed. Pure functions of events; TypedDicts are for OpenAPI."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from engine.api import Event, TokenLogprob

MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks


class PromptDetails(TypedDict):
    cached_tokens: int


class CompletionDetails(TypedDict):
    reasoning_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    tool_calls: NotRequired[list[dict[str, Any]]]


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


class Encoded(TypedDict):
    """Answer of /v1/encode: lists and numbers for one text, lists of them for several."""

    input_ids: list[int] | list[list[int]]
    length: int | list[int]


class Version(TypedDict):
    version: str


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
        self.prompt_logprobs: list[TokenLogprob] = []
        self.finish_reason = ""

    def add(self, event: Event) -> None:
        self.texts.append(event.text)
        self.logprobs.extend(event.logprobs)
        self.prompt_logprobs.extend(event.prompt_logprobs)
        self.finish_reason = event.finish_reason or ""

    @property
    def text(self) -> str:
        return "".join(self.texts)


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def token_name(raw: bytes) -> str:
    """A token's text, or where its bytes are no whole characters `bytes:\\xe4\\xbd`, as OpenAI writes it."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _chat_token(raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_name(raw), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""
    return {
        "content": [
            _chat_token(t.raw, t.logprob) | {"top_logprobs": [_chat_token(raw, p) for _, raw, p in t.top]}
            for t in tokens
        ],
        "refusal": None,
    }


def sse(body: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"
