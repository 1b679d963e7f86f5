"""From request text to token ids that fit the model: template, tokenizer and context check, beside the event loop.

User text is always encoded as text: what looks like a control token in it never becomes one.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from convert.errors import TmqError
from serve.http.errors import ApiError
from serve.http.generation.threads import call_in_thread
from serve.http.limits import Limits

T = TypeVar("T")
_THREADS = 4


class Tokenizer(Protocol):
    """What the server needs of `convert.tokenizer.tokenizer.Tokenizer`."""

    @property
    def vocab_size(self) -> int: ...

    def encode_plain(self, text: str, add_bos: bool | None = None) -> list[int]: ...

    def apply_chat_template(self, messages: Sequence[dict[str, Any]]) -> list[int]: ...


class Prompts:
    """Turns what users write into prompts. All methods raise ApiError 400 where the request is at fault."""

    def __init__(self, tokenizer: Tokenizer, context_length: int, limits: Limits) -> None:
        self._tokenizer, self._limits = tokenizer, limits
        self._threads = asyncio.Semaphore(_THREADS)
        self.context_length = context_length

    async def of_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer, by the checkpoint's own template."""
        return await self._beside(
            lambda: self._tokenizer.apply_chat_template(messages),
            "messages",
            "The chat template of this model refuses these messages",
        )

    async def of_text(self, prompt: str | list[int], add_bos: bool | None = None) -> list[int]:
        """Token ids of one plain prompt; ids are checked against the vocabulary."""
        if isinstance(prompt, list):
            vocab = self._tokenizer.vocab_size
            if any(id >= vocab for id in prompt):
                raise ApiError(
                    400,
                    f"prompt: token id {max(prompt)} is outside the vocabulary of {vocab} tokens.",
                    param="prompt",
                    code="invalid_value",
                )
            return prompt
        return await self._beside(
            lambda: self._tokenizer.encode_plain(prompt, add_bos), "prompt", "This prompt cannot be tokenized"
        )

    def check_tokens(self, ids: Sequence[int], param: str) -> None:
        """Refuse token ids of another field, such as logit_bias, that the vocabulary lacks."""
        vocab = self._tokenizer.vocab_size
        for id in ids:
            if id >= vocab:
                raise ApiError(
                    400, f"{param}: token {id} is outside the vocabulary of {vocab} tokens.", param=param
                )

    def room(self, prompt_tokens: int, max_tokens: int | None, param: str, default: int | None = None) -> int:
        """Tokens that may be generated: `max_tokens` where given and fitting, else `default` or what the context leaves."""
        left = self.context_length - prompt_tokens
        if prompt_tokens < 1:
            raise ApiError(400, f"{param}: the prompt is empty.", param=param, code="empty_prompt")
        wanted = max_tokens if max_tokens is not None else min(default or left, left)
        if left < 1 or wanted > left:
            asked = "1 token at least" if max_tokens is None else f"{max_tokens} tokens"
            raise ApiError(
                400,
                f"The model's context is {self.context_length} tokens: the prompt takes {prompt_tokens}, {asked} "
                f"of answer were asked for, {max(left, 0)} are left. Shorten the prompt or lower max_tokens.",
                param=param,
                code="context_length_exceeded",
            )
        return wanted

    async def _beside(self, function: Callable[[], T], param: str, refusal: str) -> T:
        async with self._threads:
            try:
                return await call_in_thread(function, self._limits.prompt_s)
            except asyncio.TimeoutError as e:
                raise ApiError(
                    400, f"{refusal}: it took longer than {self._limits.prompt_s:g} s.", param=param
                ) from e
            except TmqError as e:
                raise ApiError(400, f"{refusal}: {e}", param=param) from e
            except Exception as e:
                raise ApiError(400, f"{refusal}.", param=param) from e
