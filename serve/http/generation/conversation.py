"""A conversation on its way to the engine: template variables, tools and schema checked, prompt made, run started.

What chat completions and responses have in common. Refusals name the field of the endpoint that was asked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from engine.api import Event, SamplingParams
from serve.http.errors import ApiError, unsupported
from serve.http.generation.runs import Run
from serve.http.protocol.messages import NamedTool, ResponseFormat, Tool, uses_tools
from serve.http.service import Service
from serve.prompts.encoder import TemplateTraits
from serve.prompts.tool_formats import FORCED, CallReader, Piece, forced_schema


@dataclass(frozen=True)
class Talk:
    """What a client asks for, whatever its endpoint. `fields`: what it calls the messages and the form of the answer."""

    messages: list[dict[str, Any]]
    tools: list[Tool]
    tool_choice: str | NamedTool | None
    variables: dict[str, Any]
    response_format: ResponseFormat | None
    max_tokens: int | None
    count: int = 1
    one_call: bool = False
    fields: tuple[str, str] = ("messages", "response_format")


@dataclass(frozen=True)
class Turn:
    """A run and how its answers are read."""

    run: Run
    format: str | None
    names: tuple[str, ...]
    one_call: bool

    def reader(self) -> "AnswerReader":
        """For one of the answers."""
        return AnswerReader(CallReader(self.format, self.names) if self.format else None, self.one_call)


class AnswerReader:
    """Parts of one answer as text and calls; `finish_reason` is that of the API once the last part was read."""

    def __init__(self, calls: CallReader | None, one_call: bool) -> None:
        self._calls, self._one_call = calls, one_call
        self._found = 0
        self.finish_reason: str | None = None

    def read(self, event: Event) -> Piece:
        piece = Piece(event.text) if self._calls is None else self._calls.push(event.text)
        if event.finish_reason is not None and self._calls is not None:
            rest = self._calls.finish()
            piece = Piece(piece.text + rest.text, piece.calls + rest.calls)
        if self._one_call:
            piece.calls = piece.calls[: max(0, 1 - self._found)]
        self._found += len(piece.calls)
        if event.finish_reason is not None:
            called = self._found and event.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called else event.finish_reason
        return piece


async def start_turn(
    service: Service,
    request: Request,
    talk: Talk,
    sampling: Callable[[int, str | None], SamplingParams],
) -> Turn:
    """Start the run of a conversation. `sampling(max_tokens, schema)` makes its parameters. Raises ApiError."""
    client = request.state.client
    traits = TemplateTraits()
    tools = [] if talk.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in talk.tools]
    if tools or talk.variables or uses_tools(talk.messages):
        traits = await service.prompts.traits()
    variables = template_variables(traits, talk.variables)
    if not traits.reads_tools and (tools or uses_tools(talk.messages)):
        raise unsupported("tools", "is not supported with this model, whose chat template takes no tools")
    if tools and traits.tool_format is None:
        raise unsupported(
            "tools", "is not supported with this model, whose way of calling tools is not known here"
        )
    schema = await service.schema(talk.response_format, client, talk.fields[1])
    format, forced = traits.tool_format if tools else None, _forced(talk, tools)
    if forced is not None:
        await service.prompts.check_schema(forced, client, "tool_choice")
        schema, format = forced, FORCED
    ids = await service.prompts.of_chat(talk.messages, client, tools or None, variables, talk.fields[0])
    max_tokens = service.prompts.room(len(ids), talk.max_tokens, talk.fields[0])
    params = sampling(max_tokens, schema)
    run = service.runs.start([ids], params, talk.count, request.state.request_id, client)
    names = tuple(tool["function"]["name"] for tool in tools)
    return Turn(run, format, names, talk.one_call)


def _forced(talk: Talk, tools: list[dict[str, Any]]) -> str | None:
    """The schema of the call that the client wants to have; None where it leaves that to the model."""
    choice = talk.tool_choice
    if choice in (None, "none", "auto"):
        return None
    name = choice.function.name if isinstance(choice, NamedTool) else None
    names = [tool["function"]["name"] for tool in tools]
    if not names or name not in (None, *names):
        raise ApiError(
            400,
            f"tool_choice asks for {name or 'a tool'!r}: tools has {', '.join(names) or 'none'}.",
            param="tool_choice",
        )
    return forced_schema(tools, name)


def template_variables(traits: TemplateTraits, given: dict[str, Any]) -> dict[str, Any]:
    """What the model's template is given of what a client set. Raises ApiError for what it does not read and what asks for something.

    `reasoning_effort` goes to templates that read it; to those that read `enable_thinking` as whether it is other than "none".
    """
    out: dict[str, Any] = {}
    for name, value in given.items():
        if name in traits.variables:
            out[name] = value
        elif name == "reasoning_effort" and "enable_thinking" in traits.variables:
            out.setdefault("enable_thinking", value != "none")
        elif value not in ("none", False):  # no reasoning is what such a template gives anyway
            raise unsupported(name, "is not supported with this model, whose chat template does not read it")
    return out
