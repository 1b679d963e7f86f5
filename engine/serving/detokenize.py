"""From tokens to text that may be shown: whole characters only, and never a part of a stop string."""

from collections.abc import Sequence
from typing import Protocol


class TokenDecoder(Protocol):
    """Turns tokens into whole characters; bytes of an unfinished character are kept until the next token."""

    def push(self, token_id: int) -> str:
        """Characters that this token completes."""
        ...

    def flush(self) -> str:
        """What is left at the end of the sequence, an unfinished character as U+FFFD."""
        ...


class TextTools(Protocol):
    """What the core needs of a tokenizer; `convert.tokenizer.tokenizer.Tokenizer` has it."""

    eos_token_ids: tuple[int, ...]

    def decoder(self) -> TokenDecoder:
        """A decoder for one new sequence."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, for log-probabilities."""
        ...


class NoText:
    """No tokenizer: events carry tokens and empty text. For measurements."""

    eos_token_ids: tuple[int, ...] = ()

    def decoder(self) -> "NoText":
        return self

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""

    def token_bytes(self, token_id: int) -> bytes:
        return b""


class NumberText:
    """Text of a model of random weights: each token is its number, so that streams have something to carry."""

    eos_token_ids: tuple[int, ...] = ()

    def decoder(self) -> "NumberText":
        return self

    def push(self, token_id: int) -> str:
        return f" {token_id}"

    def flush(self) -> str:
        return ""

    def token_bytes(self, token_id: int) -> bytes:
        return self.push(token_id).encode()


class TextStream:
    """The text of one sequence. Text that may be the beginning of a stop string is held back until it is decided."""

    def __init__(self, decoder: TokenDecoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = [text for text in stop if text]
        self._held = ""
        self._ended = False

    def push(self, token_id: int) -> tuple[str, bool]:
        """Text that is certain after this token, and whether a stop string was met; the text ends before it."""
        fresh = self._decoder.push(token_id)
        return self._take(fresh) if self._stop else (fresh, False)

    def flush(self) -> tuple[str, bool]:
        """The rest of the text, at the end of the sequence; nothing after a stop string."""
        if self._ended:
            return "", True
        text, stopped = self._take(self._decoder.flush())
        rest, self._held = self._held, ""
        return (text, True) if stopped else (text + rest, False)

    def _take(self, fresh: str) -> tuple[str, bool]:
        text = self._held + fresh
        ends = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if ends:
            self._held, self._ended = "", True
            return text[: min(ends)], True
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
