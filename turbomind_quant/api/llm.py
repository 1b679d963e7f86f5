"""`LLM`: a model that writes, from a Python program. The engine runs in a process of its own, as under `tmq serve`; here all calls wait."""

import asyncio
import os
import queue
import threading
import uuid
import weakref
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, aclosing
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, overload

from convert.errors import ResourceError, UsageError
from engine.api import EngineDied, Event, Request, SamplingParams
from engine.config import Dtype, EngineConfig
from engine.source import ModelSource
from serve.chat.settings import ChatSettings
from serve.local import LocalModel, open_model
from turbomind_quant.api.choices import StrPath
from turbomind_quant.api.engine import engine_config

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")
Messages = Sequence[Mapping[str, str]]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class Answer:
    """What the model wrote. `finish_reason`: "stop", or "length" where it was cut at `max_tokens`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int

    def to_json(self) -> dict[str, Any]:
        """The answer as plain JSON data."""
        return asdict(self)


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn: the names and defaults of the flags of `tmq chat` (`ChatSettings`), and `stop`."""

    temperature: float  # 0 is greedy
    top_p: float
    top_k: int  # 0: all tokens
    repetition_penalty: float
    max_tokens: int | None  # None: what the context leaves
    seed: int | None  # same seed, same answers
    stop: Sequence[str]  # texts that end an answer; they are not part of it


class LLM:
    """The model at `path`, loaded. Use it in a `with` block, or call `close`; it also closes when it is no longer used.

    Args:
        path: checkpoint (float or AWQ), .gguf file, TurboMind workspace or hub name.
        device: "auto", "cpu", "cuda" or "cuda:N". dtype: "auto", "float16", "bfloat16" or "float32". tp: GPUs to split over.
        session_len: context in tokens; None: the model's. cache_max_entry_count: share of the memory left after the weights that the
            KV cache takes. quant_policy: 8 keeps keys and values in int8, 0 in the model's type.
        instance_num: sequences that run at once. family: read the model as this family, whatever its config.json says.
        trust_remote_code: run a tokenizer that exists only as code in `path`.

    `context_length` is the number of tokens that a prompt and its answer may have together. Make an LLM in the main thread: the engine's process lives as long as the thread that started it.

    Raises UsageError for a value that is none of the choices, InputError for a path that cannot be used, ResourceError where the model
    does not fit.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        device: str = EngineConfig.device,
        dtype: Dtype = EngineConfig.dtype,
        tp: int = EngineConfig.tp,
        session_len: int | None = None,
        cache_max_entry_count: float = EngineConfig.cache_fraction,
        quant_policy: int = 0,
        instance_num: int = EngineConfig.max_batch,
        family: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        config = engine_config(
            device=device,
            dtype=dtype,
            tp=tp,
            session_len=session_len,
            cache_max_entry_count=cache_max_entry_count,
            quant_policy=quant_policy,
            instance_num=instance_num,
            is_quiet=True,
        )
        source = ModelSource(os.fspath(path), family=family, trust_remote_code=trust_remote_code)
        stack = ExitStack()
        try:
            self._model: LocalModel = stack.enter_context(open_model(source, config))
            self._loop = stack.enter_context(_EventLoop())
            self.context_length = self._model.engine.stats().context_length
        except EngineDied as error:
            raise ResourceError(str(error)) from error
        finally:
            self._closing = weakref.finalize(self, stack.close)

    @overload
    def generate(self, prompts: str, **sampling: "Unpack[SamplingOptions]") -> Answer: ...  # type: ignore[overload-overlap]

    @overload
    def generate(self, prompts: Sequence[str], **sampling: "Unpack[SamplingOptions]") -> list[Answer]: ...

    def generate(
        self, prompts: str | Sequence[str], **sampling: "Unpack[SamplingOptions]"
    ) -> Answer | list[Answer]:
        """Continue plain text: one answer for one prompt, a list in order for several, which run together.

        Raises UsageError for a prompt that the context has no room for, or a setting that is out of range; ResourceError where the
        engine has ended.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        requests = [
            self._request(self._model.tokenizer.encode_plain(text, add_bos=None), sampling) for text in texts
        ]
        answers = self._wait(self._answers(requests))
        return answers[0] if isinstance(prompts, str) else answers

    def chat(self, messages: str | Messages, **sampling: "Unpack[SamplingOptions]") -> Answer:
        """Answer a conversation by the model's own chat template; a string is one message of the user.

        Raises InputError where the model has no chat template or it refuses the messages, and what `generate` raises.
        """
        return self._wait(self._answers([self._chat_request(messages, sampling)]))[0]

    def stream(self, messages: str | Messages, **sampling: "Unpack[SamplingOptions]") -> Iterator[str]:
        """The answer of `chat`, piece by piece as it is written. Left early, the answer is stopped. Raises what `chat` raises."""
        return self._pieces(self._chat_request(messages, sampling))

    def close(self) -> None:
        """End the engine. What is called afterwards raises ResourceError."""
        self._closing()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _chat_request(self, messages: str | Messages, sampling: SamplingOptions) -> Request:
        said = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self._request(self._model.tokenizer.apply_chat_template(said), sampling)

    def _request(self, prompt_ids: list[int], sampling: SamplingOptions) -> Request:
        """The request for one prompt. Raises UsageError where the context has no room, or a setting is out of range."""
        settings: dict[str, Any] = asdict(ChatSettings()) | dict(sampling)
        left = self.context_length - len(prompt_ids)
        wanted = left if settings["max_tokens"] is None else settings["max_tokens"]
        if not prompt_ids:
            raise UsageError("the prompt is empty: give at least one character.")
        if wanted > left or left < 1:
            raise UsageError(
                f"The model's context is {self.context_length} tokens: the prompt takes {len(prompt_ids)}, {max(wanted, 1)} of answer "
                f"were asked for, {max(left, 0)} are left. Shorten the prompt or lower max_tokens."
            )
        settings |= {"max_tokens": wanted, "stop": tuple(settings.get("stop", ()))}
        try:
            params = SamplingParams(**settings)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return Request(f"llm-{uuid.uuid4().hex}", tuple(prompt_ids), params)

    async def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        return await asyncio.gather(*(self._answer(request) for request in requests))

    async def _answer(self, request: Request) -> Answer:
        """Submit a request and collect its events."""
        texts: list[str] = []
        tokens: list[int] = []
        self._model.engine.submit(request)
        async with aclosing(self._model.engine.events(request.id)) as events:  # type: ignore[type-var]
            async for event in events:
                texts.append(event.text)
                tokens += event.token_ids
                _refuse_failure(event)
        return Answer("".join(texts), tuple(tokens), str(event.finish_reason), event.prompt_tokens)

    def _pieces(self, request: Request) -> Iterator[str]:
        """Texts from the event loop's thread, through a queue; None ends them."""
        texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        async def feed() -> None:
            try:
                self._model.engine.submit(request)
                async with aclosing(self._model.engine.events(request.id)) as events:  # type: ignore[type-var]
                    async for event in events:
                        texts.put(event.text)
                        _refuse_failure(event)
            finally:
                texts.put(None)

        task = self._start(feed())
        try:
            while (text := texts.get()) is not None:
                if text:
                    yield text
            _result(task)
        finally:
            task.cancel()

    def _start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Begin in the event loop's thread. Raises ResourceError where this LLM is closed."""
        if not self._closing.alive:
            work.close()
            raise ResourceError("this LLM is closed: make another one.")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it there and wait here; Ctrl-C stops both."""
        task = self._start(work)
        try:
            return _result(task)
        finally:
            task.cancel()


def _result(task: "Future[T]") -> T:
    """What the task gave. Raises ResourceError where the engine has ended."""
    try:
        return task.result()
    except EngineDied as error:
        raise ResourceError(str(error)) from error


def _refuse_failure(event: Event) -> None:
    """Raises ResourceError for the last event of a request that the engine could not finish."""
    if event.finish_reason == "error":
        raise ResourceError(event.error or "The engine could not finish this answer.")


class _EventLoop:
    """An event loop in a thread of its own, so that calls also work where a loop runs already, as in a notebook."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm-events", daemon=True)

    def __enter__(self) -> asyncio.AbstractEventLoop:
        self._thread.start()
        return self._loop

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_tasks(self) -> None:
        """Cancel what still runs, and wait until it has ended."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
