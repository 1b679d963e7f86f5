"""What a long run says while it works: on a terminal a bar that moves, elsewhere one plain line a layer; all on stderr."""

import io
import resource
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from quant.records import LinearReport

GIB = 2**30
QUIET_S = 5.0  # between plain lines of quick steps


def peak_rss_gib() -> float:
    """Largest resident memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB


def gpu_peak_gib() -> float:
    """Largest memory that torch has held on any GPU so far, in GiB; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / GIB


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 5 s or 2 h 7 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class PatientConsole(Console):
    """A console that falls silent where its reader has left, in place of ending the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Progress:
    """Layers done, loss, time left and memory of one run. Silent until `start`."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or PatientConsole(stderr=True, highlight=False)
        self._bar: RichProgress | None = None
        self._total = self._first = 0
        self._begin = self._said_at = 0.0
        self._begin_done = 0

    def say(self, text: str) -> None:
        """One line of text for the user."""
        self._print(text, None)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", "yellow")

    def _print(self, text: str, style: str | None) -> None:
        try:
            self.console.print(text, style=style, markup=False, soft_wrap=True)
        except OSError:  # the terminal is gone: hours of work do not end because nobody watches
            self.console = Console(file=io.StringIO())

    def start(self, total: int, first: int, notes: Sequence[str] = ()) -> None:
        """Begin with block `first` of `total`."""
        for note in notes:
            self.warn(note)
        if first:
            self.say(f"{self.title}: resuming at layer {first} of {total}; the layers before it are done.")
        self._total, self._first, self._begin = total, first, time.monotonic()
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[news]}"),
            )
            self._bar = RichProgress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._bar.add_task(self.title, total=total, completed=first, news="")

    def layer(self, index: int, reports: Sequence[LinearReport], warnings: Sequence[str]) -> None:
        """Block `index` is done."""
        for warning in warnings:
            self.warn(warning)
        done = index + 1 - self._first
        elapsed = time.monotonic() - self._begin
        left = elapsed / done * (self._total - index - 1)
        parts = [loss_line(reports)] if reports else []
        parts += [f"{duration(elapsed)} gone", f"{duration(left)} left", f"{peak_rss_gib():.1f} GiB"]
        if (gpu := gpu_peak_gib()) > 0:
            parts.append(f"GPU {gpu:.1f} GiB")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=index + 1, news=", ".join(parts))
        else:
            self.say(f"{self.title}: layer {index + 1}/{self._total}, {', '.join(parts)}")

    def step(self, done: int, total: int, news: str = "") -> None:
        """`done` of `total` steps of a kind that has no loss; the first call begins."""
        if self._begin == 0.0:
            self.start(total, 0)
            self._begin_done = done
        parts = [news] if news else []
        elapsed = time.monotonic() - self._begin
        if done > self._begin_done:
            left = elapsed / (done - self._begin_done) * (total - done)
            parts.append(f"{duration(left)} left")
        parts.append(f"{peak_rss_gib():.1f} GiB")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, news=", ".join(parts))
        elif done == total or time.monotonic() - self._said_at >= QUIET_S:
            self._said_at = time.monotonic()
            self.say(f"{self.title}: {done}/{total}, {', '.join(parts)}")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def loss_line(reports: Sequence[LinearReport]) -> str:
    """The loss of a block's linears, rounding to nearest against what was kept."""
    rtn = sum(report.loss_rtn for report in reports)
    after = sum(report.loss_after for report in reports)
    if rtn <= 0 or after == rtn:
        return f"loss {after:.3g}"
    return f"loss {rtn:.3g} -> {after:.3g} ({after / rtn - 1:+.0%})"
