"""POST /v1/responses: OpenAI's newer endpoint, for text and tools. Nothing is stored: a conversation comes whole each time."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.api import SamplingParams
from serve import limits
from serve.http.errors import ApiError
from serve.http.protocol.body import (
    Body,
    Empty,
    Ignored,
    IgnoredText,
    Metadata,
    Off,
    ShortText,
    Unsupported,
    Zero,
)
from serve.http.protocol.chat import Effort
from serve.http.protocol.messages import (
    FunctionSpec,
    NamedTool,
    ResponseFormat,
    SchemaSpec,
    TextPart,
    Tool,
    ToolName,
)
from serve.http.protocol.sampling import StreamOptions

Content = str | Annotated[list[TextPart], Field(max_length=limits.MAX_PARTS, fail_fast=True)]


class Item(Body):
    """A message, a call of a tool, its result, or reasoning, which is passed over."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: ShortText | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content | None = None
    call_id: ShortText | None = None
    name: ShortText | None = None
    arguments: str | None = None
    output: Content | None = None
    summary: Empty = None
    encrypted_content: Unsupported = None
    phase: ShortText | None = Field(None, description=Ignored)

    def needs(self, place: str, *fields: str) -> None:
        for name in fields:
            if getattr(self, name) is None:
                raise ApiError(
                    400, f"{place}.{name} is missing.", param=f"{place}.{name}", code="invalid_value"
                )


class FunctionTool(Body):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def as_chat(self) -> Tool:
        spec = FunctionSpec(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict
        )
        return Tool(type="function", function=spec)


class NamedFunction(Body):
    type: Literal["function"]
    name: ShortText


class TextForm(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: ShortText | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: TextForm | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Body):
    effort: Effort | None = None
    summary: Unsupported = None
    generate_summary: Unsupported = None


class ResponsesRequest(Body):
    """POST /v1/responses."""

    model: ShortText | None = Field(None, description="null: the served model.")
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Item], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)]
    ) = Field(examples=["Hello!"])
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=limits.MAX_TEMPERATURE)
    top_p: float | None = Field(None, gt=0, le=1)
    tools: Annotated[list[FunctionTool], Field(max_length=limits.MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = Field(None, description="Nothing is stored, whatever is asked.")
    truncation: Literal["disabled"] | None = None
    include: Annotated[list[ShortText], Field(max_length=16, fail_fast=True)] | None = Field(
        None, description=Ignored
    )
    top_logprobs: Zero | None = None
    background: Off | None = None
    previous_response_id: Unsupported = None
    conversation: Unsupported = None
    prompt: Unsupported = None
    max_tool_calls: Unsupported = None
    metadata: Metadata = None
    user: IgnoredText = None
    safety_identifier: IgnoredText = None
    prompt_cache_key: IgnoredText = None
    service_tier: Literal["auto", "default"] | None = None

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it. Raises ApiError 400."""
        out: list[dict[str, Any]] = []
        if self.instructions:
            out.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*out, {"role": "user", "content": self.input}]
        for index, item in enumerate(self.input):
            _append(out, item, f"input.{index}")
        return out

    def chat_tools(self) -> list[Tool]:
        return [tool.as_chat() for tool in self.tools or []]

    def choice(self) -> str | NamedTool | None:
        """`tool_choice` as chat completions write it."""
        if isinstance(self.tool_choice, NamedFunction):
            return NamedTool(type="function", function=ToolName(name=self.tool_choice.name))
        return self.tool_choice

    def variables(self) -> dict[str, Any]:
        effort = self.reasoning.effort if self.reasoning else None
        return {} if effort is None else {"reasoning_effort": effort}

    def response_format(self) -> ResponseFormat | None:
        form = self.text.format if self.text else None
        if form is None:
            return None
        spec = None if form.json_schema is None else SchemaSpec(name=form.name, schema=form.json_schema)
        return ResponseFormat(type=form.type, json_schema=spec)

    def sampling(self, max_tokens: int, json_schema: str | None) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.7 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            json_schema=json_schema,
        )


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _append(out: list[dict[str, Any]], item: Item, place: str) -> None:
    if item.type == "reasoning":
        return
    if item.type == "message":
        item.needs(place, "role", "content")
        role = "system" if item.role == "developer" else item.role
        out.append({"role": role, "content": _text(item.content)})
    elif item.type == "function_call":
        item.needs(place, "call_id", "name", "arguments")
        try:
            arguments = json.loads(item.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            name = f"{place}.arguments"
            raise ApiError(400, f"{name} is no JSON object.", param=name, code="invalid_value")
        if not out or out[-1]["role"] != "assistant":
            out.append({"role": "assistant", "content": ""})
        call = {
            "id": item.call_id,
            "type": "function",
            "function": {"name": item.name, "arguments": arguments},
        }
        out[-1].setdefault("tool_calls", []).append(call)
    else:
        item.needs(place, "call_id", "output")
        out.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
