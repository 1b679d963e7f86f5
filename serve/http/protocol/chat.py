"""POST /v1/chat/completions and POST /v1/completions."""

from typing import Annotated, Any, Literal

from pydantic import Field

from serve import limits
from serve.http.protocol.body import Body, Empty, Ignored, Off, On, TokenId, Unsupported
from serve.http.protocol.messages import Message, NamedTool, ResponseFormat, Tool, plain_messages
from serve.http.protocol.sampling import OpenAISampling

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class TemplateKwargs(Body):
    """Variables of chat templates that requests may set. Others, such as those of the renderer, are refused."""

    enable_thinking: bool | None = None
    thinking: bool | None = None
    reasoning_effort: Effort | None = None


class ChatRequest(OpenAISampling):
    """POST /v1/chat/completions. `messages` may be a plain string, as in LMDeploy: one user message."""

    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)]
        | Annotated[str, Field(min_length=1)]
    ) = Field(examples=[[{"role": "user", "content": "Hello!"}]])
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=limits.MAX_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=limits.MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call is returned.")
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = Field(
        None, description='Given to templates that read it; those that do not take "none" alone.'
    )
    enable_thinking: bool | None = Field(None, description="As chat_template_kwargs.enable_thinking.")
    chat_template_kwargs: TemplateKwargs | None = Field(
        None, description="Only what the model's own template reads; other variables are refused."
    )
    renew_session: bool | None = Field(None, description=Ignored)
    do_preprocess: On | None = None
    add_generation_prompt: On | None = None
    continue_final_message: Off | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    verbosity: Literal["medium"] | None = None
    functions: Empty = None
    function_call: Literal["none", "auto"] | None = None
    documents: Empty = None
    audio: Unsupported = None
    prediction: Unsupported = None
    chat_template: Unsupported = None
    web_search_options: Unsupported = None

    def conversation(self) -> list[dict[str, Any]]:
        if isinstance(self.messages, str):
            return [{"role": "user", "content": self.messages}]
        return plain_messages(self.messages)

    def template_variables(self) -> dict[str, Any]:
        """Variables for the template by name, those that were set."""
        given = self.chat_template_kwargs.model_dump(exclude_none=True) if self.chat_template_kwargs else {}
        own = {"enable_thinking": self.enable_thinking, "reasoning_effort": self.reasoning_effort}
        return {**given, **{name: value for name, value in own.items() if value is not None}}


class CompletionRequest(OpenAISampling):
    """POST /v1/completions. `prompt` is text or token ids, one or several."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1, max_length=limits.MAX_PROMPT_IDS, fail_fast=True)]
        | Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(min_length=1, max_length=limits.MAX_PROMPTS, fail_fast=True),
        ]
        | Annotated[
            list[
                Annotated[
                    list[TokenId], Field(min_length=1, max_length=limits.MAX_PROMPT_IDS, fail_fast=True)
                ]
            ],
            Field(min_length=1, max_length=limits.MAX_PROMPTS, fail_fast=True),
        ]
    ) = Field(examples=["Once upon a time"])
    max_tokens: int | None = Field(None, ge=0, description="0 with echo: only the prompt is judged.")
    logprobs: int | None = Field(None, ge=0, le=limits.MAX_LOGPROBS)
    echo: bool | None = Field(
        None, description="The answer begins with the prompt, log-probabilities included."
    )
    prompt_logprobs: int | None = Field(
        None, ge=0, le=limits.MAX_LOGPROBS, description="Alternatives for each token of the prompt."
    )
    response_format: ResponseFormat | None = None
    add_special_tokens: bool | None = Field(None, description="false: no BOS before the prompt.")
    suffix: Empty = None

    @property
    def prompt_scores(self) -> int | None:
        """Alternatives wanted for each token of the prompt; None where the prompt is not judged."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]
