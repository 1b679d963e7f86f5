"""Types of the arguments that functions of the library share, and checks of values. Messages name the flag and what it may hold."""

import os
from collections.abc import Iterable, Sequence
from typing import TypeAlias, TypeVar

from convert.errors import UsageError

StrPath: TypeAlias = str | os.PathLike[str]

T = TypeVar("T", int, str)


def check_one(value: T, flag: str, known: Sequence[T]) -> None:
    """Raises UsageError for a value that is not known."""
    if value not in known:
        raise UsageError(f"{flag} {value!r}: expected one of {', '.join(map(str, known))}.")


def check_positive(value: float | None, flag: str, least: float = 0.0) -> None:
    """Raises UsageError for a number below `least`, or not above 0; None is a value that was left out."""
    if value is not None and not (value > 0 and value >= least):
        raise UsageError(
            f"{flag} {value}: expected {f'at least {least:g}' if least else 'a number above 0'}."
        )


def chosen(values: Iterable[T], flag: str, known: Sequence[T]) -> tuple[T, ...]:
    """The values without repetitions. Raises UsageError where there is none, or one that is not known."""
    values = list(values)
    if not values or not set(values) <= set(known):
        text = ",".join(map(str, values))
        listed = ", ".join(map(str, known))
        raise UsageError(f"{flag} {text!r}: expected one or more of {listed}, separated by commas.")
    return tuple(dict.fromkeys(values))


def counts(values: Iterable[int], flag: str) -> tuple[int, ...]:
    """The numbers without repetitions. Raises UsageError for one below 1."""
    values = list(values)
    if any(value < 1 for value in values):
        raise UsageError(f"{flag} {','.join(map(str, values))!r}: expected numbers of at least 1.")
    return tuple(dict.fromkeys(values))
