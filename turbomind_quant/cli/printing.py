"""Results on stdout: one JSON document, or text and tables for people."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAIN_WIDTH = 160  # of tables that go to a file or a pipe


def show(
    document: Any, view: Callable[[], Sequence["RenderableType"]], as_json: bool, exit_code: int = 0
) -> None:
    """Print `document` as JSON, or the parts that `view` makes. An exit code above 0 ends the command."""
    if as_json:
        print_json(document)
    else:
        print_parts(view())
    if exit_code:
        click.get_current_context().exit(exit_code)


def print_parts(parts: Sequence["RenderableType"]) -> None:
    """Texts as they are, tables as wide as the terminal, or as `PLAIN_WIDTH` where there is none."""
    from rich.text import Text

    from turbomind_quant.cli.progress import PatientConsole

    console = PatientConsole(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    for part in parts:
        if isinstance(part, str):
            click.echo(part)
        else:
            console.print(part, soft_wrap=isinstance(part, Text))


def print_json(value: Any) -> None:
    """One JSON document on stdout. Numbers that are not finite become null."""
    click.echo(json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """The same value with NaN and infinities as None, tuples as lists."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value
