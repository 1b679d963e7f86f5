"""How models write calls of tools, as far as we know: named by the text of their chat templates, and read from their answers."""

import json
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

HERMES = "hermes"  # <tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen2.5, Qwen3
LLAMA = "llama"  # {"name": ..., "parameters": {...}} as the whole answer: Llama 3.1 to 3.3
MISTRAL = "mistral"  # [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]: Mistral 7B v0.3, Nemo


def format_of(template: str) -> str | None:
    """The format that a chat template teaches its model; None for one that we do not read, such as Qwen3-Coder's XML."""
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return HERMES
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template and "[CALL_ID]" not in template:
        return MISTRAL
    if ('"parameters"' in template and "<|eom_id|>" in template) or "ipython" in template:
        return LLAMA
    return None


FORCED = "forced"  # one call as a JSON object and nothing else: by constrained decoding, whatever the model's own format
_BEGIN, _END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` is JSON."""

    id: str
    name: str
    arguments: str


@dataclass
class Piece:
    """What a part of an answer holds: text, and calls that are complete."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)


def forced_schema(tools: list[dict[str, Any]], name: str | None) -> str:
    """The JSON schema of one call of a tool, of `name` where given."""
    branches = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
        if name in (None, tool["function"]["name"])
    ]
    return json.dumps(branches[0] if len(branches) == 1 else {"anyOf": branches})


class CallReader:
    """Takes the calls out of an answer as it comes. Text that looks like a call and is none stays text."""

    def __init__(self, format: str, names: Collection[str]) -> None:
        self._format, self._names = format, frozenset(names)
        self._held = ""
        self._inside = False  # of a call, in the format that marks them
        self._whole: bool | None = (
            None  # in the other formats: the answer is one or more calls and nothing else
        )

    def push(self, text: str) -> Piece:
        """What is certain after this part of the answer."""
        self._held += text
        if self._format == HERMES:
            return self._between_marks()
        if self._whole is None and self._held.strip():
            self._whole = self._format == FORCED or self._held.lstrip()[0] in "[{<"
        if self._whole is False:
            rest, self._held = self._held, ""
            return Piece(rest)
        return Piece()

    def finish(self) -> Piece:
        """The rest, at the end of the answer."""
        rest, self._held = self._held, ""
        if self._format == HERMES:
            calls = self._calls(rest) if self._inside else None
            return Piece("", calls) if calls else Piece((_BEGIN if self._inside else "") + rest)
        calls = self._calls(rest.strip().removeprefix("[TOOL_CALLS]"))
        return Piece("", calls) if calls else Piece(rest)

    def _between_marks(self) -> Piece:
        piece = Piece()
        while True:
            mark = _END if self._inside else _BEGIN
            place = self._held.find(mark)
            if place < 0:
                break
            before, self._held = self._held[:place], self._held[place + len(mark) :]
            if not self._inside:
                piece.text += before
            elif calls := self._calls(before):
                piece.calls += calls
            else:
                piece.text += _BEGIN + before + _END
            self._inside = not self._inside
        if not self._inside:
            keep = next((n for n in range(len(_BEGIN) - 1, 0, -1) if self._held.endswith(_BEGIN[:n])), 0)
            piece.text += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        if piece.calls and not piece.text.strip():
            piece.text = ""  # the line ends around a call are no text
        return piece

    def _calls(self, text: str) -> list[Call] | None:
        """The calls that a text is made of; None where it is anything else."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        calls = []
        for call in found if isinstance(found, list) else [found]:
            if not isinstance(call, dict) or call.get("name") not in self._names:
                return None
            arguments = call.get("arguments", call.get("parameters", {}))
            if not isinstance(arguments, dict):
                return None
            # The template of the Mistral format wants ids of nine letters and digits.
            mistral = self._format == MISTRAL
            identifier = uuid.uuid4().hex[:9] if mistral else f"call_{uuid.uuid4().hex[:24]}"
            calls.append(Call(identifier, str(call["name"]), json.dumps(arguments, ensure_ascii=False)))
        return calls or None
