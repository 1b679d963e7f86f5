"""One record of a data set to its text or its chat, or to the reason why it has neither. Reads no files."""

import json
from dataclasses import dataclass
from typing import Any

from convert.folder.json_files import show

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # of the "conversations" form
CALL_KEYS = ("tool_calls", "tool_call_id", "name")  # of a message, for templates that render tool calls

Messages = list[dict[str, Any]]
Document = str | Messages


@dataclass(frozen=True)
class Unusable:
    """A record without text, and why."""

    reason: str


def document_of(record: Any, column: str) -> Document | Unusable:
    """The text or the chat of one record: its `column`, else "messages" or "conversations"."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        return Unusable(f"{type(record).__name__} instead of an object")
    if column in record:
        value = record[column]
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            return Unusable(
                f'"{column}" is {"null" if value is None else type(value).__name__} instead of text'
            )
        return _messages(value, column)
    for name in ("messages", "conversations"):
        if isinstance(record.get(name), list):
            return _messages(record[name], name)
    found = ", ".join(show(str(key), 40) for key in sorted(map(str, record))[:8]) or "none"
    return Unusable(f'no column "{column}" (found: {found})')


def _messages(turns: list[Any], name: str) -> Messages | Unusable:
    messages: Messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            return Unusable(f'"{name}" holds {type(turn).__name__} instead of messages')
        role = turn.get("role", turn.get("from"))
        content = _content(turn.get("content", turn.get("value")), bool(turn.get("tool_calls")))
        if isinstance(content, Unusable):
            return content
        if not isinstance(role, str) or content is None:
            return Unusable(f'a message of "{name}" lacks role or content')
        message: dict[str, Any] = {"role": ROLES.get(role, role), "content": content}
        message |= {key: turn[key] for key in CALL_KEYS if turn.get(key) is not None}
        if "tool_calls" in message:
            message["tool_calls"] = _calls(message["tool_calls"])
        messages.append(message)
    return messages if messages else Unusable(f'"{name}" is empty')


def _content(value: Any, has_calls: bool) -> str | Unusable | None:
    """The text of a message: a string, a list of text parts, or nothing beside a tool call. None where there is none."""
    if value is None:
        return "" if has_calls else None
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    texts = []
    for part in value:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            return Unusable(f"a part of a message is {show(str(kind), 40)} instead of text")
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any) -> Any:
    """Tool calls as chat templates want them: the arguments as an object, where a record holds them as JSON text."""
    if not isinstance(calls, list):
        return calls
    return [_call(call) for call in calls]


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
