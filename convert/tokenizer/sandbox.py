"""The template language of chat templates, bounded in every operation: jinja2's immutable sandbox, with a time and sizes.

Filters, tests and globals are those that transformers gives to templates (`transformers.utils.chat_template_utils`), less those that
no chat needs and that have no bound, such as `urlize` and `lipsum`. Each operator, filter, test and call that can make something
larger than what it was given looks at its operands first: `9 ** 9 ** 9`, `"%2000000000d" % 1` and lists of lists of lists are refused
before they are made. A single call into a library is therefore short, and between calls the time is looked at.
"""

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jinja2 import ext, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_environment

MOST_CHARACTERS = 2**24  # of one text
MOST_ITEMS = 2**20  # of one value, those inside its items included
MOST_MADE = 2**29  # characters that all operations of one rendering write together
MOST_BITS = 4096  # of an integer
MOST_COUNT = 10_000  # a number that says how often, how wide or how far
_LEFT_OUT = ("filesizeformat", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_NO_METHODS = frozenset({"translate", "maketrans", "format_map", "to_bytes", "from_bytes", "encode"})
# These look at a value's items and not into them: nothing in them grows with what lies deeper.
_SHALLOW_FILTERS = frozenset(
    [
        "attr",
        "count",
        "d",
        "default",
        "first",
        "items",
        "last",
        "length",
        "list",
        "map",
        "reject",
        "rejectattr",
        "reverse",
        "select",
        "selectattr",
        "tojson",
    ]
)
_DEEP_TESTS = frozenset(
    [
        "!=",
        "<",
        "<=",
        "==",
        ">",
        ">=",
        "eq",
        "equalto",
        "ge",
        "greaterthan",
        "gt",
        "in",
        "le",
        "lessthan",
        "lt",
        "ne",
    ]
)
_NUMBERS = re.compile(r"\d+")


class TooLarge(TemplateRuntimeError):
    """An operation would make something beyond the bounds."""


class TooSlow(TemplateRuntimeError):
    """The time of a rendering is over."""


@dataclass
class Budget:
    """What one rendering may still take: until when, and how many characters it has written."""

    end: float
    made: int = 0


_budget: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextmanager
def limited(seconds: float) -> Iterator[Budget]:
    """A budget for what is rendered inside the block."""
    budget = Budget(time.monotonic() + seconds)
    token = _budget.set(budget)
    try:
        yield budget
    finally:
        _budget.reset(token)


def look_at_time() -> None:
    budget = _budget.get()
    if budget is not None and time.monotonic() > budget.end:
        raise TooSlow("the time is over")


def size(value: Any) -> int:
    """Characters of a value's text, about: those of its strings, and a few for each item. Raises TooLarge at the bounds."""
    characters = items = 0
    stack = [value]
    while stack:
        part = stack.pop()
        items += 1
        if isinstance(part, str | bytes):
            characters += len(part)
        elif isinstance(part, Mapping):
            stack.extend(part.keys())
            stack.extend(part.values())
        elif isinstance(part, list | tuple | set | frozenset):
            stack.extend(part)
        if items + len(stack) > MOST_ITEMS or characters > MOST_CHARACTERS:
            raise TooLarge("a value is too large")
    return characters + 8 * items


def _made(characters: int) -> None:
    """Count what an operation is about to write."""
    if characters > MOST_CHARACTERS:
        raise TooLarge(f"an operation would write {characters:,} characters")
    budget = _budget.get()
    if budget is not None:
        budget.made += characters
        if budget.made > MOST_MADE:
            raise TooLarge("the template writes too much")


def _checked(value: Any) -> Any:
    """`value`, if it is not too large to be compared, sorted or written. Scalars cost nothing."""
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        size(value)
    return _small(value)


def _small(value: Any) -> Any:
    """`value`, if it is no number beyond the bounds."""
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise TooLarge("a number is too large")
    return value


def _counts(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MOST_COUNT:
            raise TooLarge(f"{value} is more than a template may count to")
        _checked(value)


def _formatted(text: str, operands: Any) -> None:
    """Bound the result of `text % operands` or `text.format(operands)`: widths, and operands used many times."""
    widest = max((int(n[:12]) for n in _NUMBERS.findall(text)), default=0)
    if widest > MOST_COUNT or "*" in text or re.search(r":[^{}]*\{", text):
        raise TooLarge("a format is wider than a template may write")
    fields = text.count("%") + text.count("{")
    _made(len(text) + fields * (widest + size(operands)))


def _binop(operator: str, left: Any, right: Any) -> None:
    """Bound the result of an operator before it is computed."""
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "**" and numbers:
        if abs(left) > 1 and right > 0 and left.bit_length() * right > MOST_BITS:
            raise TooLarge("a power is too large")
    elif operator == "*" and numbers:
        if left.bit_length() + right.bit_length() > MOST_BITS:
            raise TooLarge("a product is too large")
    elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
        many, what = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(what, str | list | tuple | bytes):
            _repeated(what, many)
    elif operator == "%" and isinstance(left, str | bytes):
        _formatted(left if isinstance(left, str) else left.decode("latin-1"), right)
    elif operator == "+" and isinstance(left, str | bytes) and isinstance(right, str | bytes):
        _made(len(left) + len(right))
    elif operator == "+" and isinstance(left, list | tuple):
        _made(size(left) + size(right))


def _repeated(what: Any, many: int) -> None:
    if not isinstance(what, str | bytes) and len(what) * max(many, 0) > MOST_ITEMS:
        raise TooLarge("a list is too long")
    _made(max(many, 0) * size(what))


def _method(text: Any, name: str, arguments: tuple[Any, ...]) -> None:
    """Bound the result of a method of a text whose size does not follow from the counts alone."""
    if not isinstance(text, str | bytes):
        return
    owner: Any = text
    if name == "replace" and len(arguments) > 1:
        _replaced(owner, arguments[0], arguments[1])
    elif name == "join" and arguments:
        items = list(arguments[0])
        _made(size(items) + len(owner) * len(items))
    elif name == "expandtabs":
        _made(len(owner) + owner.count("\t" if isinstance(owner, str) else b"\t") * MOST_COUNT)
    else:
        _made(len(owner))


def _replaced(text: Any, old: Any, new: Any) -> None:
    if isinstance(old, str | bytes) and isinstance(new, str | bytes):
        _made(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _filtered(name: str, value: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Bound the result of a filter before it runs."""
    _counts(arguments)
    _counts(named.values())
    given = [*arguments, *named.values()]
    if isinstance(value, str):
        if name == "replace" and len(given) > 1:
            _replaced(value, str(given[0]), str(given[1]))
        elif name == "indent":
            widths = [g if isinstance(g, int) else len(g) for g in given[:1] if isinstance(g, int | str)]
            _made(len(value) + (value.count("\n") + 1) * max([4, *widths]))
        elif name == "format":
            _formatted(value, given)
        else:
            _made(len(value))
    elif name == "join" and given and isinstance(value, list | tuple):
        _made(size(value) + len(str(given[0])) * len(value))
    if name not in _SHALLOW_FILTERS:
        _checked(value)


def _guarded(value: Iterable[Any]) -> Iterator[Any]:
    """The items of a generator, with a look at the time and a bound on their number."""
    for count, item in enumerate(value):
        look_at_time()
        if count > MOST_ITEMS:
            raise TooLarge("a list is too long")
        yield item


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # where the value stands

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        look_at_time()
        before, (value, *rest) = arguments[:first], arguments[first:] or (None,)
        if isinstance(value, Iterator):
            value = _guarded(value)
        _filtered(name, value, tuple(rest), named)
        return _small(function(*before, value, *rest, **named))

    return call


def _bounded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        look_at_time()
        if name in _DEEP_TESTS:
            for value in (*arguments, *named.values()):
                _checked(value)
        return function(*arguments, **named)

    return call


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Not jinja2's, which escapes for HTML."""
    if indent is not None and (not isinstance(indent, int) or indent > 64):
        raise TooLarge("JSON would be indented too far")
    _made(size(value) * (1 + (indent or 0)))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateRuntimeError(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 200 or any(int(n[:12]) > 99 for n in _NUMBERS.findall(pattern)):
        raise TooLarge("a date is written too wide")
    return datetime.datetime.now().strftime(pattern)


class _Namespace(Namespace):
    """jinja2's, without names that begin with an underscore."""

    def __init__(*arguments: Any, **named: Any) -> None:  # so that `namespace(self=...)` works
        self, *rest = arguments
        attributes = dict(*rest, **named)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"templates cannot store the attribute {name!r} on a namespace")


class _Generation(ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, with which training marks answers: here it means its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Generator(CodeGenerator):
    """Sends what the sandbox does not intercept, `~` and comparisons, through the environment's bounds."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(environment.checked(")
        self.visit(node.expr, frame)
        self.write(")")
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        from jinja2.compiler import operators

        self.write(f" {operators[node.op]} environment.checked(")
        self.visit(node.expr, frame)
        self.write(")")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Compiles chat templates. What they do counts against the budget of `limited`."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "-", "*", "**", "%", "/", "//"})
    checked = staticmethod(_checked)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while compiling
            extensions=[_Generation, ext.loopcontrols],
            finalize=_finalize,
        )
        for name in _LEFT_OUT:
            del self.filters[name]
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded_filter(name, f) for name, f in self.filters.items()}
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: _bounded_test(name, test) for name, test in tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:  # type: ignore[override]
        """Join the output of a block."""
        out, characters = [], 0
        for piece in pieces:
            characters += len(piece)
            if characters > MOST_CHARACTERS:
                raise TooLarge(f"a block writes more than {MOST_CHARACTERS:,} characters")
            out.append(piece)
        _made(characters)
        return "".join(out)

    def joined(self, parts: tuple[Any, ...]) -> str:
        """`a ~ b`"""
        look_at_time()
        _made(size(parts))
        return str_join(parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        look_at_time()
        _binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(
        __self, __context: Context, __obj: Any, *args: Any, **kwargs: Any
    ) -> Any:  # its names are no keywords
        look_at_time()
        owner = getattr(__obj, "__self__", None)
        if owner is not None and isinstance(owner, str | bytes | int | float | list | tuple | dict):
            _counts(args)
            _counts(kwargs.values())
            _method(owner, getattr(__obj, "__name__", ""), args)
        return _small(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapper = super().wrap_str_format(value)
        if wrapper is None:
            return None

        def bounded(*arguments: Any, **named: Any) -> str:
            _formatted(value.__self__, [arguments, named])
            return wrapper(*arguments, **named)

        return functools.update_wrapper(bounded, value)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _NO_METHODS and super().is_safe_attribute(obj, attr, value)


@pass_environment
def _finalize(environment: ChatEnvironment, value: Any) -> Any:
    """What `{{ value }}` writes: looked at before it becomes text."""
    look_at_time()
    if isinstance(value, str):
        return value
    if not isinstance(value, Undefined):
        _made(size(_checked(value)))
    return value
