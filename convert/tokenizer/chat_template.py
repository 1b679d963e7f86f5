"""Chat templates are code of strangers: rendered in a sandbox that is bounded in every operation (`sandbox.py`), with a time limit.

What users wrote stays text: control tokens inside messages are replaced by marks before rendering, and control tokens that the
template itself writes are marked after it, so that the two can be told apart.
"""

import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from convert.errors import InputError
from convert.folder.json_files import show

if TYPE_CHECKING:
    from jinja2 import Template

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
        from convert.tokenizer.sandbox import ChatEnvironment

        self.source, self.control, self.variables = source, dict(control), dict(variables)
        self._environment = ChatEnvironment()
        self._compiled: Template | None = None
        longest_first = sorted(self.control, key=len, reverse=True)
        self._written = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._either = re.compile(f"\ue000{_NONCE}t(\\d+)\ue001|({self._written.pattern})")

    def reads(self, name: str) -> bool:
        """Whether the template looks at a variable of this name, such as "tools" or "enable_thinking"."""
        from jinja2 import meta

        return name in meta.find_undeclared_variables(self._environment.parse(self.source))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as one text in which control tokens of the template are marked (`control_mark`).

        `tools` and `variables` are given to the template as they are, control tokens in them as text.
        Raises InputError when the template fails, refuses the messages, takes too long or writes too much.
        """
        from jinja2.exceptions import TemplateError

        from convert.tokenizer.sandbox import TooLarge, TooSlow, limited

        try:
            with limited(TIME_LIMIT_S), _Deadline(TIME_LIMIT_S):
                if self._compiled is None:
                    self._compiled = self._environment.from_string(self.source)
                text = self._written_out(
                    self._compiled.generate(
                        messages=[_with_reasoning(self._guard(message)) for message in messages],
                        tools=self._guard(tools),
                        documents=None,
                        add_generation_prompt=add_generation_prompt,
                        **{**self.variables, **self._guard(variables or {})},
                    )
                )
        except (_TooSlow, TooSlow) as error:
            raise InputError(
                f"the chat template did not finish within {TIME_LIMIT_S:g} s. It may loop for ever."
            ) from error
        except TooLarge as error:
            raise InputError(
                f"the chat template does more than a template may ({show(str(error))})."
            ) from error
        except TemplateError as error:
            raise InputError(f"the chat template refuses these messages: {show(str(error))}.") from error
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            SyntaxError,
            MemoryError,
        ) as error:
            raise InputError(
                f"the chat template fails on these messages ({type(error).__name__}: {show(str(error))})."
            ) from error
        names = {str(index): token for token, index in self.control.items()}
        return self._either.sub(
            lambda m: names[m[1]] if m[1] is not None else control_mark(self.control[m[2]]), text
        )

    @staticmethod
    def _written_out(pieces: Iterator[str]) -> str:
        out, length = [], 0
        for piece in pieces:
            length += len(piece)
            if length > OUTPUT_LIMIT:
                raise InputError(
                    f"the chat template wrote {length:,} characters, above the limit of {OUTPUT_LIMIT:,}."
                )
            out.append(piece)
        return "".join(out)

    def _guard(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._written.sub(lambda m: f"\ue000{_NONCE}t{self.control[m[0]]}\ue001", value)
        if isinstance(value, Mapping):
            return {str(key): self._guard(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard(item) for item in value]
        return value


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose reasoning has all the names that templates read it by, as transformers gives it to them."""
    names = ("reasoning_content", "thinking", "reasoning")
    text = next((message[name] for name in names if message.get(name) is not None), None)
    return message if text is None else {"thinking": text, **message, "reasoning_content": text}


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
