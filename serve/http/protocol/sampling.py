"""How tokens are drawn: the fields that every endpoint which generates takes, and those of OpenAI's two."""

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from engine.api import SamplingParams
from serve import limits
from serve.http.errors import ApiError
from serve.http.protocol.body import (
    Body,
    Empty,
    IgnoredText,
    Metadata,
    Off,
    On,
    ShortText,
    TokenId,
    Unsupported,
    Zero,
    at_most,
)

StopString = Annotated[str, Field(min_length=1, max_length=limits.MAX_STOP_CHARS)]
BiasedToken = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-limits.MAX_PENALTY, le=limits.MAX_PENALTY)]
LogitBias = Annotated[
    dict[BiasedToken, Bias],
    at_most(limits.MAX_LOGIT_BIAS),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": limits.MAX_LOGIT_BIAS,
        }
    ),
]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Off | None = None
    continuous_usage_stats: Off | None = None


class Nothing(Body):
    """An empty object."""


class Sampling(Body):
    """How tokens are drawn. `chosen` has the defaults."""

    temperature: float | None = Field(None, ge=0, le=limits.MAX_TEMPERATURE)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=limits.MAX_TOP_K, description="-1, 0 or null: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(
        None, ge=limits.MIN_REPETITION_PENALTY, le=limits.MAX_REPETITION_PENALTY
    )
    seed: int | None = Field(None, ge=limits.SEED_MIN, le=limits.SEED_MAX)
    stop: (
        Annotated[list[StopString], Field(max_length=limits.MAX_STOP, fail_fast=True)]
        | StopString
        | Off
        | None
    ) = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=limits.MAX_STOP_TOKEN_IDS, fail_fast=True)] | None
    ) = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    session_id: int | None = Field(None, ge=limits.SESSION_MIN, le=limits.SESSION_MAX)
    skip_special_tokens: On | None = None
    spaces_between_special_tokens: On | None = None
    kwargs: Nothing | None = Field(None, description="LMDeploy's client sends it, empty.")
    adapter_name: Empty = None
    min_new_tokens: Zero | None = None
    min_tokens: Zero | None = None
    use_beam_search: Off | None = None
    length_penalty: float | None = Field(None, ge=1, le=1)
    early_stopping: Off | None = None
    detokenize: On | None = None
    priority: Zero | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(self.stop) if isinstance(self.stop, list) else ()

    def chosen(
        self, max_tokens: int, temperature: float = 0.7, top_p: float = 1.0, top_k: int = 0
    ) -> dict[str, Any]:
        """Keyword arguments of `SamplingParams`, defaults filled in."""
        return {
            "max_tokens": max_tokens,
            "temperature": temperature if self.temperature is None else self.temperature,
            "top_p": self.top_p or top_p,
            "top_k": top_k if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "seed": self.seed,
            "stop": self.stop_strings,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": bool(self.ignore_eos),
        }


class OpenAISampling(Sampling):
    """What both OpenAI endpoints take beyond `Sampling`."""

    model: ShortText | None = Field(None, description="null: the served model.")
    n: int | None = Field(None, ge=1, le=limits.MAX_N)
    max_tokens: int | None = Field(None, ge=1)
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    best_of: int | None = Field(None, ge=1, description="Only the value of n, which asks for nothing.")
    return_token_ids: Off | None = None
    return_tokens_as_token_ids: Off | None = None
    include_stop_str_in_output: Off | None = None
    user: IgnoredText = None
    safety_identifier: IgnoredText = None
    prompt_cache_key: IgnoredText = None
    metadata: Metadata = None
    store: Off | None = None
    service_tier: Literal["auto", "default"] | None = None
    truncate_prompt_tokens: Unsupported = None

    @property
    def count(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def named_tokens(self) -> list[tuple[str, list[int]]]:
        """Token ids that fields name, by field: they must lie within the vocabulary."""
        return [
            ("logit_bias", [int(token) for token in self.logit_bias or {}]),
            ("stop_token_ids", self.stop_token_ids or []),
        ]

    def sampling(self, max_tokens: int, logprobs: int | None, **more: Any) -> SamplingParams:
        if self.best_of not in (None, self.count):
            raise ApiError(
                400,
                f"'best_of' is not supported by this server beyond the value of n, {self.count}: leave it out.",
                param="best_of",
                code="unsupported_field",
            )
        return SamplingParams(
            **self.chosen(max_tokens),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            logprobs=logprobs,
            **more,
        )
