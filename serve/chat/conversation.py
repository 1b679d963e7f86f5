"""A conversation as the user sees it: system text and turns, undo, save and load. No terminal, no model."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.errors import InputError, UsageError

_FORMAT = "tmq-chat-1"


@dataclass
class Conversation:
    """Messages in order, without the system text. Roles alternate: user, assistant."""

    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def prompt(self) -> list[dict[str, str]]:
        """What is sent: the system text, where there is one, and all messages."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.messages]

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answered(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})

    def undo(self) -> str | None:
        """Take the last question and its answer away; the question's text, or None where there is none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def save(self, path: Path, model: str) -> None:
        """Write JSON. Raises UsageError where `path` exists and is not a conversation that was saved before."""
        if path.exists():
            try:
                Conversation.load(path)
            except InputError as e:
                raise UsageError(
                    f"{path} exists and is not a saved conversation: choose another name."
                ) from e
        from convert.folder.files import atomic_write  # imports torch: only where a file is written

        body = {"format": _FORMAT, "model": model, "system": self.system, "messages": self.messages}
        atomic_write(path, (json.dumps(body, ensure_ascii=False, indent=1) + "\n").encode())

    @staticmethod
    def load(path: Path) -> "Conversation":
        """Read what `save` wrote. Raises InputError."""
        try:
            raw: Any = json.loads(path.read_text("utf-8"))
        except OSError as e:
            raise InputError(f"{path} cannot be read: {e.strerror or e}.") from e
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path} is not JSON: expected a file written by /save.") from e
        if not (
            isinstance(raw, dict) and raw.get("format") == _FORMAT and isinstance(raw.get("system"), str)
        ):
            raise InputError(f'{path} is not a saved conversation: expected "format": "{_FORMAT}".')
        messages = raw.get("messages")
        if not isinstance(messages, list):
            raise InputError(f"{path} has no list of messages.")
        for number, message in enumerate(messages):
            is_whole = (
                isinstance(message, dict)
                and set(message) == {"role", "content"}
                and message["role"] in ("user", "assistant")
                and isinstance(message["content"], str)
            )
            if not is_whole:
                raise InputError(f"{path}: message {number} is not a role (user, assistant) with a content.")
        return Conversation(raw["system"], messages)
