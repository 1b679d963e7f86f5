"""A backend over HTTP: any server that speaks OpenAI's chat completions. Knows no engine."""

import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import httpx

from convert.errors import InputError, ResourceError, TmqError
from serve.chat.backends import Messages, Piece
from serve.chat.settings import ChatSettings
from serve.http.errors import ApiError

_NO_SUCH_PATH = (404, 405, 501)
_UNKNOWN = (
    "stream_options",
    "extra_forbidden",
    "extra fields",
    "extra inputs",
    "unknown field",
    "unrecognized",
)
_TIMEOUT = httpx.Timeout(
    connect=10.0, read=600.0, write=60.0, pool=10.0
)  # read: to the first token of a long prompt


def api_base(url: str) -> str:
    """`url` up to and with "/v1". Raises InputError for what is no http address."""
    refusal = f"{url!r} is not the address of a server: expected one like http://127.0.0.1:23333."
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        httpx.URL(parts.geturl())
    except (ValueError, httpx.InvalidURL) as e:  # ValueError: of a port, or of brackets
        raise InputError(refusal) from e
    if not known:
        raise InputError(refusal)
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


class HttpBackend:
    """A chat backend on a server. Make one with `connect`."""

    def __init__(self, client: httpx.AsyncClient, name: str, context_length: int | None) -> None:
        self._client, self._name, self._context_length = client, name, context_length
        self._asks_usage = True  # until the server says that it knows no stream_options

    @staticmethod
    async def connect(url: str, api_key: str | None = None, model: str | None = None) -> "HttpBackend":
        """Ask the server for its models and take `model`, or the first.

        Raises InputError where the address, the key or `model` is wrong, ResourceError where no server answers, and
        ApiError for an answer other than success.
        """
        base = api_base(url)
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise InputError(
                "The API key holds characters that no header carries: expected printable ASCII. Copy it again."
            )
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        local = urlsplit(base).hostname in ("127.0.0.1", "localhost", "::1")
        client = httpx.AsyncClient(
            base_url=base + "/", headers=headers, timeout=_TIMEOUT, trust_env=not local
        )
        try:
            reply = await client.get("models")
            if model is not None and reply.status_code in _NO_SUCH_PATH:
                return HttpBackend(client, model, None)  # it does not list its models
            if reply.status_code != 200:
                said = _told(reply.content) or _beginning(reply.content)
                hint = " Name its model with --model." if reply.status_code in _NO_SUCH_PATH else ""
                raise ApiError(reply.status_code, f"{base}/models answers {reply.status_code}: {said}{hint}")
            cards = {str(card["id"]): card for card in reply.json()["data"]}
            name = model or next(iter(cards))
        except httpx.HTTPError as e:
            await client.aclose()
            reason = str(e) or type(e).__name__
            raise ResourceError(
                f"No server answers at {base}: {reason}. Is it running? `tmq serve PATH` starts one."
            ) from e
        except (ValueError, KeyError, TypeError, StopIteration) as e:
            await client.aclose()
            raise InputError(f"{base}/models does not answer as an OpenAI-compatible server does.") from e
        except TmqError:
            await client.aclose()
            raise
        if name not in cards:
            await client.aclose()
            raise InputError(
                f"The server has no model {name!r}: it has {', '.join(sorted(cards)) or 'none'}."
            )
        length = cards[name].get("max_model_len")
        return HttpBackend(client, name, length if isinstance(length, int) else None)

    @property
    def name(self) -> str:
        return self._name

    @property
    def context_length(self) -> int | None:
        return self._context_length

    async def answer(self, messages: Messages, settings: ChatSettings) -> AsyncIterator[Piece]:
        body: dict[str, Any] = {
            "model": self._name,
            "messages": list(messages),
            "stream": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        }
        # What other servers may not know is sent only where it was asked for.
        if settings.top_k:
            body["top_k"] = settings.top_k
        if settings.repetition_penalty != 1.0:
            body["repetition_penalty"] = settings.repetition_penalty
        if settings.max_tokens is not None:
            body["max_tokens"] = settings.max_tokens
        if settings.seed is not None:
            body["seed"] = settings.seed
        if self._asks_usage:
            body["stream_options"] = {"include_usage": True}
        try:
            async with self._client.stream("POST", "chat/completions", json=body) as reply:
                said = b"" if reply.status_code == 200 else await reply.aread()
                if reply.status_code == 200:
                    async for piece in _pieces(reply):
                        yield piece
                    return
            if self._asks_usage and reply.status_code in (400, 422) and _knows_not(said):
                self._asks_usage = False
                async for piece in self.answer(messages, settings):
                    yield piece
                return
            raise ApiError(reply.status_code, _refusal(reply.status_code, said))
        except httpx.HTTPError as e:
            raise ApiError(503, f"The connection to the server failed: {str(e) or type(e).__name__}.") from e

    async def close(self) -> None:
        await self._client.aclose()


def _knows_not(body: bytes) -> bool:
    """Whether a refusal is about a field that the server does not know."""
    text = body.decode("utf-8", "replace").lower()
    return any(word in text for word in _UNKNOWN)


def _told(body: bytes) -> str | None:
    """The message of an error body of OpenAI's shape, None for any other."""
    try:
        return str(json.loads(body)["error"]["message"] or "") or None
    except (ValueError, KeyError, TypeError):
        return None


def _beginning(body: bytes) -> str:
    return body[:300].decode("utf-8", "replace").strip() or "no message"


def _refusal(status: int, body: bytes) -> str:
    return _told(body) or f"The server answers {status}: {_beginning(body)}"


def _chunk(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise ApiError(502, "The server sent what is no answer of an OpenAI-compatible server.")
    return chunk


async def _pieces(reply: httpx.Response) -> AsyncIterator[Piece]:
    """Pieces of a stream of chunks. Tokens are the server's count where it tells, else the chunks that held text."""
    count, finish, prompt_tokens, told = 0, None, 0, None
    async for line in reply.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            break
        chunk = _chunk(data)
        if chunk.get("error"):
            raise ApiError(500, _refusal(500, data.encode()))
        if chunk.get("usage"):
            told = chunk["usage"].get("completion_tokens")
            prompt_tokens = chunk["usage"].get("prompt_tokens", 0)
        for choice in chunk.get("choices") or []:
            text = (choice.get("delta") or {}).get("content") or ""
            finish = choice.get("finish_reason") or finish
            count += bool(text)
            if text:
                yield Piece(text, None, prompt_tokens, count)
    if finish is None:
        raise ApiError(503, "The connection ended inside the answer.")
    yield Piece("", finish, prompt_tokens, told if told is not None else count)
