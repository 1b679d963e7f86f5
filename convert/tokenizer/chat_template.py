"""Chat templates are code of strangers: rendered in transformers' immutable sandbox, with a time and a size limit.

What users wrote stays text: control tokens inside messages are replaced by marks before rendering, and control tokens that the
template itself writes are marked after it, so that the two can be told apart.
"""

import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from convert.errors import InputError
from convert.folder.json_files import show

TIME_LIMIT_S = 5.0
OUTPUT_LIMIT = 2**24  # characters
# Unguessable, so that no text can hold a mark; it never reaches the token ids.
_NONCE = secrets.token_hex(8)


def control_mark(index: int) -> str:
    """The text that stands for control token `index` where the template wrote it."""
    return f"\ue000{_NONCE}c{index}\ue001"


class ChatTemplate:
    """A compiled template. `control`: text of every control token -> its id."""

    def __init__(self, source: str, control: Mapping[str, int], variables: Mapping[str, str]) -> None:
        self.source, self.control, self.variables = source, dict(control), dict(variables)
        longest_first = sorted(self.control, key=len, reverse=True)
        self._written = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._either = re.compile(f"\ue000{_NONCE}t(\\d+)\ue001|({self._written.pattern})")

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as one text in which control tokens of the template are marked (`control_mark`).

        Raises InputError when the template fails, refuses the messages, takes too long or writes too much.
        """
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        limit = _Deadline(TIME_LIMIT_S)
        try:
            with limit:
                rendered, _ = render_jinja_template(
                    conversations=[[self._guard(message) for message in messages]],
                    chat_template=self.source,
                    add_generation_prompt=add_generation_prompt,
                    **self.variables,
                )
        except _TooSlow as error:
            raise InputError(
                f"the chat template did not finish within {TIME_LIMIT_S:g} s. It may loop for ever."
            ) from error
        except TemplateError as error:
            raise InputError(f"the chat template refuses these messages: {show(str(error))}.") from error
        except (
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            OverflowError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise InputError(
                f"the chat template fails on these messages ({type(error).__name__}: {show(str(error))})."
            ) from error
        text: str = rendered[0]
        if len(text) > OUTPUT_LIMIT:
            raise InputError(
                f"the chat template wrote {len(text):,} characters, above the limit of {OUTPUT_LIMIT:,}."
            )
        names = {str(index): token for token, index in self.control.items()}
        return self._either.sub(
            lambda m: names[m[1]] if m[1] is not None else control_mark(self.control[m[2]]), text
        )

    def _guard(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._written.sub(lambda m: f"\ue000{_NONCE}t{self.control[m[0]]}\ue001", value)
        if isinstance(value, Mapping):
            return {str(key): self._guard(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard(item) for item in value]
        return value


class _TooSlow(Exception):
    """Raised inside a template that used up its time."""


class _Deadline:
    """Ends Python code of this thread after some seconds, by a trace function: templates are compiled to Python lines."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        self._end = time.monotonic() + self.seconds
        self._old = sys.gettrace()
        if self._old is None:  # a debugger or coverage keeps its own
            sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        if self._old is None:
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > self._end:
            raise _TooSlow
        # only the lines of the template itself are watched; calls of other functions are checked once each
        return self._trace if frame.f_code.co_filename == "<template>" else None
