"""`Encoder`: what turns conversations and texts into token ids. `ThreadEncoder` is the one for a program with a single user."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from convert.errors import InputError
from convert.tokenizer.chat_template import ChatTemplate
from engine.serving.structure import StructureError, Structures
from serve.prompts.threads import call_in_thread
from serve.prompts.tool_formats import format_of

T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None
VARIABLES = ("enable_thinking", "thinking", "reasoning_effort")  # that requests may set
PROMPT_S = 10.0  # to render a chat template and tokenize
_THREADS = 4


class Tokenizer(Protocol):
    """What the server needs of `convert.tokenizer.tokenizer.Tokenizer`."""

    @property
    def vocab_size(self) -> int: ...

    def encode_plain(self, text: str, add_bos: bool | None = None) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Tools = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]: ...


@dataclass(frozen=True)
class TemplateTraits:
    """What the model's chat template reads. `tool_format`: how the model writes calls of tools, None where that is not known."""

    reads_tools: bool = False
    tool_format: str | None = None
    variables: tuple[str, ...] = ()

    @staticmethod
    def of(tokenizer: Any) -> "TemplateTraits":
        """Those of a tokenizer with a template; none for another, and for a template that cannot be read."""
        if not getattr(tokenizer, "has_chat_template", False):
            return TemplateTraits()
        template: ChatTemplate = tokenizer.template
        try:
            reads = tuple(name for name in VARIABLES if template.reads(name))
            return TemplateTraits(template.reads("tools"), format_of(template.source), reads)
        except Exception:  # each request will be told what is wrong with the template
            return TemplateTraits()


def check_schema(tokenizer: Any, schema: str) -> None:
    """Raises InputError for a JSON schema that answers of this tokenizer cannot follow."""
    document = getattr(tokenizer, "document_json", None)
    if document is None:  # a tokenizer of tests: its engine follows no schema either
        return
    try:
        Structures(document, tokenizer.vocab_size, ()).grammar(schema)
    except StructureError as error:
        raise InputError(str(error)) from error


class Encoder(Protocol):
    """Raises `convert.errors.TmqError` where the text or the template is at fault, asyncio.TimeoutError where it takes too long,
    and any other Exception for what nobody foresaw. `client`: whose work it is; no client holds up another."""

    @property
    def vocab_size(self) -> int: ...

    async def traits(self) -> TemplateTraits: ...

    async def text(self, text: str, add_bos: bool | None, client: str = "") -> list[int]: ...

    async def chat(
        self, messages: Messages, tools: Tools, variables: Mapping[str, Any], client: str = ""
    ) -> list[int]: ...

    async def pieces(self, ids: Sequence[int], client: str = "") -> list[bytes]:
        """The bytes that each token stands for."""
        ...

    async def check_schema(self, schema: str, client: str = "") -> None:
        """Raises InputError for a JSON schema that answers cannot follow."""
        ...

    async def close(self) -> None: ...


class ThreadEncoder:
    """Encodes in threads of this process: a long text may hold up what else runs here."""

    def __init__(self, tokenizer: Tokenizer, timeout_s: float = PROMPT_S) -> None:
        self._tokenizer, self._timeout_s = tokenizer, timeout_s
        self._threads = asyncio.Semaphore(_THREADS)
        self._traits: TemplateTraits | None = None

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    async def traits(self) -> TemplateTraits:
        if self._traits is None:
            self._traits = await self._beside(lambda: TemplateTraits.of(self._tokenizer))
        return self._traits

    async def text(self, text: str, add_bos: bool | None, client: str = "") -> list[int]:
        return await self._beside(lambda: self._tokenizer.encode_plain(text, add_bos))

    async def chat(
        self, messages: Messages, tools: Tools, variables: Mapping[str, Any], client: str = ""
    ) -> list[int]:
        if not tools and not variables:
            return await self._beside(lambda: self._tokenizer.apply_chat_template(messages))
        return await self._beside(
            lambda: self._tokenizer.apply_chat_template(messages, tools=tools, variables=variables)
        )

    async def pieces(self, ids: Sequence[int], client: str = "") -> list[bytes]:
        return await self._beside(lambda: [self._tokenizer.token_bytes(i) for i in ids])

    async def check_schema(self, schema: str, client: str = "") -> None:
        await self._beside(lambda: check_schema(self._tokenizer, schema))

    async def close(self) -> None:
        """Nothing to end: the threads end with their work."""

    async def _beside(self, function: Callable[[], T]) -> T:
        async with self._threads:
            return await call_in_thread(function, self._timeout_s)
