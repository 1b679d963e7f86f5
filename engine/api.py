"""All that `serve` sees of the engine: requests in, events out. Plain data, no tensors, no torch.

Requests cross a process boundary as JSON (`to_json`, `from_json`), events as `engine.process.wire` writes them; nothing as pickles.
"""

import json
import math
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those filters off.

    max_tokens 0 draws nothing: the prompt is computed alone, for its log-probabilities.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; 0: of the chosen token; n: and of the n likeliest
    logit_bias: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: int | None = None  # as logprobs, for the tokens of the prompt
    json_schema: str | None = None  # JSON of a schema: tokens are drawn so that the text follows it

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens is {self.max_tokens}: expected 0 or more.")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: expected a finite number of at least 0.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}: expected a number above 0 and at most 1.")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p is {self.min_p}: expected a number from 0 to 1.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: expected 0 (off) or a positive number.")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}: expected a finite number above 0."
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}: expected a finite number.")
        if not all(math.isfinite(bias) for _, bias in self.logit_bias):
            raise ValueError("logit_bias holds a value that is not finite.")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}: expected 0 or more, or none.")


@dataclass(frozen=True)
class Request:
    """One sequence to generate. `deadline_s` is the time it may take from its submission, in seconds.

    Requests of one `client` wait for each other; between clients the engine shares its places and its cache evenly.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    deadline_s: float | None = None
    client: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Request":
        raw = json.loads(text)
        sampling = raw.pop("sampling")
        for name in ("stop", "stop_token_ids"):
            sampling[name] = tuple(sampling[name])
        sampling["logit_bias"] = tuple((int(token), float(bias)) for token, bias in sampling["logit_bias"])
        return Request(
            raw["id"], tuple(raw["prompt_ids"]), SamplingParams(**sampling), raw["deadline_s"], raw["client"]
        )


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one token, and of the likeliest alternatives as (token id, bytes, logprob).

    `raw` are the bytes that the token stands for: a character of UTF-8 may be spread over several tokens. `rank` is 1 + the
    number of likelier tokens, where it was counted: for tokens of a prompt.
    """

    token_id: int
    raw: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class Event:
    """News of one request: tokens and whole characters since the last event. The last event has a `finish_reason`.

    `text` never ends inside a character and never holds a stop string. `error` is a sentence for the user where
    finish_reason is "error". `prompt_logprobs`, where asked for, come once, with the first event: those of the second token of
    the prompt and all after it, since nothing predicts the first.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Stats:
    """A snapshot of the engine. Blocks are KV cache blocks; rates are over the engine's last second or so."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    preemptions_total: int = 0
    tokens_per_s: float = 0.0
    context_length: int = 0
    model: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Stats":
        raw: dict[str, Any] = json.loads(text)
        return Stats(**{f.name: raw[f.name] for f in fields(Stats)})


class EngineDied(RuntimeError):
    """The engine is gone: no request will be answered any more."""


class Engine(Protocol):
    """What the server holds. `submit` returns the request's id; `events` ends after the event with a finish_reason."""

    def submit(self, request: Request) -> str: ...

    def events(self, request_id: str) -> AsyncIterator[Event]: ...

    def abort(self, request_id: str) -> None: ...

    def stats(self) -> Stats: ...

    def trouble(self, silence_s: float | None = None) -> str | None:
        """What hangs, as a sentence; None while the engine shows that it works. `silence_s`: without a sign of life; None: as
        many seconds as mean that it will not come back."""
        ...
