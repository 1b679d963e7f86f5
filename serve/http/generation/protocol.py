"""What requests may say: one strict model per endpoint. Unknown fields are refused by name, null means "the default".

Fields of OpenAI's and LMDeploy's API that we do not do are declared with the type null, so that a client that sends
them empty is served and one that means them is refused. Limits that depend on configuration are not checked here.
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from engine.api import SamplingParams
from serve.http import limits


def _only(value: bool) -> AfterValidator:
    def check(given: bool) -> bool:
        if given is not value:
            raise ValueError(f"only {str(value).lower()} is supported")
        return given

    return AfterValidator(check)


# Not Literal[True] and Literal[False]: to those 1 and 0 are equal.
On = Annotated[bool, _only(True), WithJsonSchema({"type": "boolean", "const": True})]
Off = Annotated[bool, _only(False), WithJsonSchema({"type": "boolean", "const": False})]
Unsupported: TypeAlias = Annotated[None, Field(description="Not supported: refused unless null.")]
Ignored = "Accepted for compatibility; has no effect here."
StopString = Annotated[str, Field(min_length=1, max_length=limits.MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
BiasedToken = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-limits.MAX_PENALTY, le=limits.MAX_PENALTY)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Unsupported = None
    reasoning_content: Unsupported = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it: two strings."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Off | None = None


class Nothing(Body):
    """An empty object."""


class Sampling(Body):
    """How tokens are drawn, for every endpoint that generates. `chosen` has the defaults."""

    temperature: float | None = Field(None, ge=0, le=limits.MAX_TEMPERATURE)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=limits.MAX_TOP_K, description="0 or null: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(
        None, ge=limits.MIN_REPETITION_PENALTY, le=limits.MAX_REPETITION_PENALTY
    )
    seed: int | None = Field(None, ge=limits.SEED_MIN, le=limits.SEED_MAX)
    stop: Annotated[list[StopString], Field(max_length=limits.MAX_STOP)] | StopString | Off | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    session_id: int | None = Field(None, ge=limits.SESSION_MIN, le=limits.SESSION_MAX)
    skip_special_tokens: On | None = None
    spaces_between_special_tokens: On | None = None
    kwargs: Nothing | None = Field(None, description="LMDeploy's client sends it, empty.")
    adapter_name: Unsupported = None
    min_new_tokens: Unsupported = None

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
            "top_k": top_k if self.top_k is None else self.top_k,
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "seed": self.seed,
            "stop": self.stop_strings,
            "ignore_eos": bool(self.ignore_eos),
        }


class OpenAISampling(Sampling):
    """What both OpenAI endpoints take beyond `Sampling`."""

    model: str | None = Field(None, max_length=limits.MAX_NAME_CHARS, description="null: the served model.")
    n: int | None = Field(None, ge=1, le=limits.MAX_N)
    max_tokens: int | None = Field(None, ge=1)
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[BiasedToken, Bias] | None = Field(None, max_length=limits.MAX_LOGIT_BIAS)
    user: str | None = Field(None, max_length=limits.MAX_NAME_CHARS, description=Ignored)
    best_of: Unsupported = None
    return_token_ids: Off | None = None
    include_stop_str_in_output: Off | None = None

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        return SamplingParams(
            **self.chosen(max_tokens),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            logprobs=logprobs,
        )


class ChatRequest(OpenAISampling):
    """POST /v1/chat/completions. `messages` may be a plain string, as in LMDeploy: one user message."""

    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
        | Annotated[str, Field(min_length=1)]
    ) = Field(examples=[[{"role": "user", "content": "Hello!"}]])
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=limits.MAX_LOGPROBS)
    renew_session: bool | None = Field(None, description=Ignored)
    do_preprocess: On | None = None
    tools: Unsupported = None
    tool_choice: Literal["none"] | None = None
    functions: Unsupported = None
    function_call: Unsupported = None
    parallel_tool_calls: Unsupported = None
    response_format: Unsupported = None
    modalities: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    enable_thinking: Unsupported = None
    chat_template: Unsupported = None
    chat_template_kwargs: Unsupported = None
    web_search_options: Unsupported = None
    metadata: Unsupported = None
    store: Off | None = None
    service_tier: Unsupported = None
    verbosity: Unsupported = None

    def conversation(self) -> list[dict[str, str]]:
        if isinstance(self.messages, str):
            return [{"role": "user", "content": self.messages}]
        return [message.plain() for message in self.messages]


class CompletionRequest(OpenAISampling):
    """POST /v1/completions. `prompt` is text or token ids, one or several."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=limits.MAX_PROMPTS)
        ]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=limits.MAX_PROMPTS),
        ]
    ) = Field(examples=["Once upon a time"])
    logprobs: int | None = Field(None, ge=0, le=limits.MAX_LOGPROBS)
    echo: Off | None = None
    suffix: Unsupported = None

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class InteractiveRequest(Sampling):
    """POST /v1/chat/interactive, LMDeploy's endpoint that keeps the conversation on the server."""

    prompt: str | Annotated[list[Message], Field(max_length=limits.MAX_MESSAGES)]
    interactive_mode: bool | None = None
    cancel: bool | None = None
    request_output_len: int | None = Field(None, ge=0, description="0 with an empty prompt ends the session.")
    image_url: Unsupported = None

    def turn(self) -> list[dict[str, str]]:
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}] if self.prompt else []
        return [message.plain() for message in self.prompt]


class TokenizeText(Body):
    """POST /tokenize, a plain prompt."""

    model: str | None = Field(None, max_length=limits.MAX_NAME_CHARS)
    prompt: str
    add_special_tokens: bool | None = Field(None, description="false: no BOS before the prompt.")


class TokenizeChat(Body):
    """POST /tokenize, a conversation, as the model would see it."""

    model: str | None = Field(None, max_length=limits.MAX_NAME_CHARS)
    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
