"""What a command hands back, for people and for programs."""

import sys
from dataclasses import dataclass, field
from typing import Any

import click
from rich.console import RenderableType

from turbomind_quant.cli.progress import PatientConsole

SHOWN = 12  # warnings and notes that are printed; all stand in the manifest
PLAIN_WIDTH = 160  # of tables that go to a file or a pipe


@dataclass
class Outcome:
    """A result: `document` for --json, `parts` (text or rich tables) for people, the exit code."""

    document: Any
    parts: list[RenderableType] = field(default_factory=list)
    exit_code: int = 0

    def show(self) -> None:
        console = PatientConsole(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
        for part in self.parts:
            if isinstance(part, str):
                click.echo(part)
            else:
                console.print(part)
