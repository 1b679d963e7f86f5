"""Draws the events of a long run: on a terminal a bar that moves, elsewhere one plain line a layer; all on stderr."""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from quant.progress import ProgressEvent
from turbomind_quant.cli.views.durations import duration

QUIET_S = 5.0  # between plain lines of quick steps


class PatientConsole(Console):
    """A console that falls silent where its reader has left, in place of ending the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class ShownProgress:
    """A listener that shows what it hears. `stop` takes a bar away that is still there."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or PatientConsole(stderr=True, highlight=False)
        self._bar: Bar | None = None
        self._said_at = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        match event.kind:
            case "note":
                self._print(event.text, None)
            case "warning":
                self._print(f"warning: {event.text}", "yellow")
            case "begin":
                self._begin(event)
            case "layer" | "step":
                self._count(event)
            case "end":
                self.stop()

    def _print(self, text: str, style: str | None) -> None:
        try:
            self.console.print(text, style=style, markup=False, soft_wrap=True)
        except OSError:  # the terminal is gone: hours of work do not end because nobody watches
            self.console = Console(file=io.StringIO())

    def _begin(self, event: ProgressEvent) -> None:
        self.stop()
        self._said_at = 0.0
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[news]}"),
            )
            self._bar = Bar(*columns, console=self.console, transient=True)
            self._bar.start()
            self._bar.add_task(event.stage, total=event.total, completed=event.done, news="")

    def _count(self, event: ProgressEvent) -> None:
        news = ", ".join(figures(event))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=event.done, news=news)
        elif event.kind == "layer":
            self._print(f"{event.stage}: layer {event.done}/{event.total}, {news}", None)
        elif event.done == event.total or time.monotonic() - self._said_at >= QUIET_S:
            self._said_at = time.monotonic()
            self._print(f"{event.stage}: {event.done}/{event.total}, {news}", None)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def figures(event: ProgressEvent) -> list[str]:
    """What a layer or step says of itself, and of time and memory."""
    parts = [event.text] if event.text else []
    if event.kind == "layer":
        parts.append(f"{duration(event.elapsed_s)} gone")
    if event.remaining_s is not None:
        parts.append(f"{duration(event.remaining_s)} left")
    parts.append(f"{event.memory_gib:.1f} GiB")
    if event.kind == "layer" and event.gpu_memory_gib > 0:
        parts.append(f"GPU {event.gpu_memory_gib:.1f} GiB")
    return parts


@contextmanager
def shown_progress() -> Iterator[ShownProgress]:
    """The progress of one command on stderr; no bar outlives the command."""
    shown = ShownProgress()
    try:
        yield shown
    finally:
        shown.stop()
