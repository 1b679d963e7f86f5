"""From request text to token ids that fit the model: limits in characters, template, tokenizer and context check.

User text is always encoded as text: what looks like a control token in it never becomes one. The work is done by an `Encoder`,
beside the event loop; nothing here costs more than a glance at the text.
"""

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from convert.errors import TmqError
from engine.serving.structure import is_available
from serve.http.errors import ApiError
from serve.limits import MAX_SCHEMA_CHARS, Limits
from serve.prompts.encoder import Encoder, Messages, TemplateTraits, Tools
from serve.prompts.pool import Busy

T = TypeVar("T")


class Prompts:
    """Turns what users write into prompts. All methods raise ApiError 400 where the request is at fault."""

    def __init__(self, encoder: Encoder, context_length: int, limits: Limits) -> None:
        self._encoder, self._limits = encoder, limits
        self.context_length = context_length

    async def traits(self) -> TemplateTraits:
        """What the model's chat template reads."""
        return await self._made(self._encoder.traits(), "messages", "The chat template cannot be read")

    async def of_chat(
        self,
        messages: Messages,
        client: str = "",
        tools: Tools = None,
        variables: Mapping[str, Any] | None = None,
        param: str = "messages",
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer, by the checkpoint's own template."""
        characters = sum(len(message["content"]) for message in messages)
        if tools:
            characters += len(json.dumps(tools))
        self._check_length(characters, param)
        return await self._made(
            self._encoder.chat(messages, tools, variables or {}, client),
            param,
            "The chat template of this model refuses these messages",
        )

    async def of_text(
        self,
        prompt: str | list[int],
        add_bos: bool | None = None,
        client: str = "",
        param: str = "prompt",
        counts_only: bool = False,
    ) -> list[int]:
        """Token ids of one plain prompt; ids are checked against the vocabulary. `counts_only`: the ids are all that is wanted, so
        that the text may be longer than the context."""
        if isinstance(prompt, list):
            if len(prompt) > self.context_length:
                raise self._too_long(f"the prompt takes {len(prompt)}", param)
            self.check_tokens(prompt, param)
            return prompt
        if not counts_only:
            self._check_length(len(prompt), param)
        return await self._made(
            self._encoder.text(prompt, add_bos, client), param, "This prompt cannot be tokenized"
        )

    async def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes that each token of a prompt stands for."""
        return await self._made(self._encoder.pieces(ids), "prompt", "This prompt cannot be echoed")

    async def check_schema(self, schema: str, client: str, param: str) -> None:
        """Refuse a JSON schema that answers cannot follow."""
        if not is_available():
            raise ApiError(
                400,
                f"{param}: answers in a given form need the package llguidance: pip install 'turbomind-quant[structured]' where "
                "this server runs.",
                param=param,
                code="unsupported_field",
            )
        if len(schema) > MAX_SCHEMA_CHARS:
            raise ApiError(
                400,
                f"{param}: the schema has {len(schema)} characters, at most {MAX_SCHEMA_CHARS} are taken.",
                param=param,
            )
        await self._made(self._encoder.check_schema(schema, client), param, param)

    def check_tokens(self, ids: Sequence[int], param: str) -> None:
        """Refuse token ids that the vocabulary lacks."""
        vocab = self._encoder.vocab_size
        if ids and max(ids) >= vocab:
            raise ApiError(
                400,
                f"{param}: token id {max(ids)} is outside the vocabulary of {vocab} tokens.",
                param=param,
                code="invalid_value",
            )

    def room(self, prompt_tokens: int, max_tokens: int | None, param: str, default: int | None = None) -> int:
        """Tokens that may be generated: `max_tokens` where given and fitting, else `default` or what the context leaves."""
        left = self.context_length - prompt_tokens
        if prompt_tokens < 1:
            raise ApiError(400, f"{param}: the prompt is empty.", param=param, code="empty_prompt")
        wanted = max_tokens if max_tokens is not None else min(default or left, left)
        if wanted > left or (left < 1 and max_tokens is None):
            asked = "1 token at least" if max_tokens is None else f"{max_tokens} tokens"
            raise self._too_long(
                f"the prompt takes {prompt_tokens}, {asked} of answer were asked for, {max(left, 0)} are left",
                param,
            )
        return wanted

    def _check_length(self, characters: int, param: str) -> None:
        """Refuse a text that is too long to be tokenized at all."""
        most = self._limits.prompt_chars(self.context_length)
        if characters > most:
            raise self._too_long(f"{characters} characters are more than the {most} that are taken", param)

    def _too_long(self, what: str, param: str) -> ApiError:
        return ApiError(
            400,
            f"The model's context is {self.context_length} tokens: {what}. Shorten the prompt or lower max_tokens.",
            param=param,
            code="context_length_exceeded",
        )

    async def _made(self, work: Coroutine[Any, Any, T], param: str, refusal: str) -> T:
        try:
            return await work
        except asyncio.TimeoutError as e:
            raise ApiError(
                400, f"{refusal}: it took longer than {self._limits.prompt_s:g} s.", param=param
            ) from e
        except Busy as e:
            raise ApiError(
                429, "Too many prompts of this client wait to be read. Try again in 5 s.", code="queue_full",
                headers={"Retry-After": "5"},
            ) from e  # fmt: skip
        except TmqError as e:
            raise ApiError(400, f"{refusal}: {e}", param=param) from e
        except Exception as e:
            raise ApiError(400, f"{refusal}.", param=param) from e
