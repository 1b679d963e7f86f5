"""What a chat talks to: an engine of its own or a server. One protocol, so that terminal and page need not know which."""

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.api import Engine, EngineDied, Request, SamplingParams
from serve.chat.settings import ChatSettings
from serve.http.errors import ApiError, unavailable
from serve.http.generation.prompts import Prompts
from serve.limits import Limits
from serve.prompts.encoder import ThreadEncoder, Tokenizer

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Piece:
    """A part of an answer. The last one has a finish_reason; token counts are of the answer so far."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Backend(Protocol):
    """A model that answers conversations. `answer` raises ApiError with a sentence for the user."""

    @property
    def name(self) -> str: ...

    @property
    def context_length(self) -> int | None: ...

    def answer(self, messages: Messages, settings: ChatSettings) -> AsyncIterator[Piece]: ...

    async def close(self) -> None: ...


class EngineBackend:
    """A backend on an engine in our hands. The caller closes the engine.

    A max_tokens that the context does not leave is refused, as a server does, or with `clip` cut to what is left.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, clip: bool = False) -> None:
        self._engine, self._clip = engine, clip
        self._prompts = Prompts(ThreadEncoder(tokenizer), engine.stats().context_length, Limits())
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def context_length(self) -> int | None:
        return self._prompts.context_length

    async def answer(self, messages: Messages, settings: ChatSettings) -> AsyncIterator[Piece]:
        ids = await self._prompts.of_chat(messages)
        room = self._prompts.room(len(ids), None if self._clip else settings.max_tokens, "messages")
        sampling = SamplingParams(
            max_tokens=min(settings.max_tokens or room, room),
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            repetition_penalty=settings.repetition_penalty,
            seed=settings.seed,
        )
        request = Request(f"chat-{uuid.uuid4().hex}", tuple(ids), sampling)
        finished = False
        try:
            self._engine.submit(request)
            async for event in self._engine.events(request.id):
                finished = event.finish_reason is not None
                if event.finish_reason == "error":
                    raise ApiError(500, event.error or "The engine could not finish this answer.")
                yield Piece(event.text, event.finish_reason, event.prompt_tokens, event.completion_tokens)
        except EngineDied as e:
            finished = True
            raise unavailable("The engine has stopped.") from e
        finally:
            if not finished:
                self._engine.abort(request.id)

    async def close(self) -> None:
        """Nothing to release: the engine is the caller's."""
