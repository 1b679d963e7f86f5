"""Messages of a conversation, the tools that it names and the calls of them, as chat completions write them."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from serve import limits
from serve.http.errors import ApiError
from serve.http.protocol.body import Body, Empty, ShortText, Unsupported


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Empty = None
    logprobs: Empty = None


class CalledFunction(Body):
    name: ShortText
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(Body):
    id: ShortText | None = None
    type: Literal["function"] | None = None
    function: CalledFunction
    index: int | None = Field(None, ge=0)


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=limits.MAX_PARTS, fail_fast=True)] | None = None
    name: ShortText | None = None
    type: Literal["text", "message"] | None = Field(None, description="Has no effect; lm-eval sends it.")
    tool_calls: Annotated[list[ToolCall], Field(max_length=limits.MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: ShortText | None = None
    reasoning_content: str | None = Field(None, description="Given to templates that read it.")
    refusal: Empty = None
    annotations: Empty = None
    audio: Unsupported = None
    function_call: Unsupported = None

    def plain(self, place: str) -> dict[str, Any]:
        """The message as chat templates take it. `place` names it in a refusal, such as "messages.0"."""
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise _at_fault(
                f"{place}.content", "is null: only an assistant's message with tool_calls may lack text"
            )
        if self.tool_calls and self.role != "assistant":
            raise _at_fault(f"{place}.tool_calls", "belong to messages of the role assistant")
        if self.role == "tool" and not self.tool_call_id:
            raise _at_fault(
                f"{place}.tool_call_id", "is missing: a message of the role tool answers one call"
            )
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        out: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        if self.name:
            out["name"] = self.name
        if self.reasoning_content:
            out["reasoning_content"] = self.reasoning_content
        if self.tool_call_id:
            out["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            out["tool_calls"] = [
                _called(call, f"{place}.tool_calls.{index}") for index, call in enumerate(self.tool_calls)
            ]
        return out


def plain_messages(messages: Sequence[Message], name: str = "messages") -> list[dict[str, Any]]:
    """All messages as chat templates take them. Raises ApiError 400."""
    return [message.plain(f"{name}.{index}") for index, message in enumerate(messages)]


def uses_tools(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether a conversation holds calls of tools or their results."""
    return any(message["role"] == "tool" or "tool_calls" in message for message in messages)


def _called(call: ToolCall, place: str) -> dict[str, Any]:
    """Templates want the arguments as an object, not as the text that OpenAI's API carries."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise _at_fault(f"{place}.function.arguments", "is no JSON object")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or "", "type": "function", "function": function}


def _at_fault(param: str, what: str) -> ApiError:
    return ApiError(400, f"{param} {what}.", param=param, code="invalid_value")


class FunctionSpec(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionSpec


class ToolName(Body):
    name: ShortText


class NamedTool(Body):
    type: Literal["function"]
    function: ToolName


class SchemaSpec(Body):
    name: ShortText | None = None
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`json_object`: any JSON object. `json_schema`: what the schema allows. Both by constrained decoding."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaSpec | None = None

    def schema_text(self) -> str | None:
        """The JSON schema that answers must follow, as text; None for plain text. Raises ApiError 400."""
        if self.type == "json_object":
            return json.dumps({"type": "object"})
        if self.type == "json_schema":
            if self.json_schema is None:
                raise _at_fault("response_format.json_schema", "is missing")
            return json.dumps(self.json_schema.json_schema)
        return None
