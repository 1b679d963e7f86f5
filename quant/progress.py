"""How far a long run is, as events to one listener. Shows nothing itself: the command line draws the events, a program may log them.

Without a listener everything here is silent. Imports no torch.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from quant.memory import gpu_peak_gib, peak_rss_gib

if TYPE_CHECKING:
    from quant.block_task import LinearReport

Kind = Literal["note", "warning", "begin", "layer", "step", "end"]


@dataclass(frozen=True)
class ProgressEvent:
    """One piece of news.

    A "note" or a "warning" is a sentence in `text`. A stage that counts begins once ("begin"), tells every decoder block ("layer") or
    every other step ("step") that is done, and ends once ("end"); `text` of a layer or step holds its figures, as in "KL 0.0123".
    """

    stage: str  # what is being done: "awq default", "writing text"
    kind: Kind
    text: str = ""
    done: int = 0  # layers or steps behind us, those of an earlier run included
    total: int = 0
    elapsed_s: float = 0.0  # since the stage began in this process
    remaining_s: float | None = None  # as estimated from the steps so far; None before the first
    memory_gib: float = 0.0  # the largest resident memory of this process so far
    gpu_memory_gib: float = 0.0  # the largest memory that torch has held on any GPU so far


Listener = Callable[[ProgressEvent], None]


class Progress:
    """One stage of a run: says sentences, counts layers or steps, measures the time. `listener` None: silent."""

    def __init__(self, stage: str, listener: Listener | None = None) -> None:
        self.stage, self.listener = stage, listener
        self._total = self._first = 0
        self._begin: float | None = None

    def new_stage(self, stage: str) -> "Progress":
        """Another stage of the same run, told to the same listener."""
        return Progress(stage, self.listener)

    def say(self, text: str) -> None:
        """One sentence for the user."""
        self._tell(ProgressEvent(self.stage, "note", text))

    def warn(self, text: str) -> None:
        """One sentence about something that the user should look at."""
        self._tell(ProgressEvent(self.stage, "warning", text))

    def start(self, total: int, first: int, notes: Sequence[str] = ()) -> None:
        """Begin with layer or step `first` of `total`; `notes` are warnings about what an earlier run left."""
        for note in notes:
            self.warn(note)
        if first:
            self.say(f"{self.stage}: resuming at layer {first} of {total}; the layers before it are done.")
        self._total, self._first, self._begin = total, first, time.monotonic()
        self._tell(ProgressEvent(self.stage, "begin", done=first, total=total))

    def layer(self, index: int, reports: Sequence["LinearReport"], warnings: Sequence[str]) -> None:
        """Decoder block `index` is done."""
        for warning in warnings:
            self.warn(warning)
        self._count("layer", index + 1, loss_line(reports) if reports else "")

    def step(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total` steps that are no layers; the first call begins the stage."""
        if self._begin is None:
            self.start(total, 0)
            self._first = done
        self._count("step", done, text)

    def _count(self, kind: Literal["layer", "step"], done: int, text: str) -> None:
        elapsed = time.monotonic() - (self._begin or 0.0)
        fresh = done - self._first
        remaining = elapsed / fresh * (self._total - done) if fresh > 0 else None
        event = ProgressEvent(
            self.stage, kind, text, done, self._total, elapsed, remaining, peak_rss_gib(), gpu_peak_gib()
        )
        self._tell(event)

    def stop(self) -> None:
        """The stage is over, at its end or before; a stage that never began has none."""
        if self._begin is not None:
            self._begin = None
            self._tell(ProgressEvent(self.stage, "end", total=self._total))

    def _tell(self, event: ProgressEvent) -> None:
        if self.listener is not None:
            self.listener(event)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def loss_line(reports: Sequence["LinearReport"]) -> str:
    """The summed loss of a block's linears: of round to nearest, and of what was kept."""
    rtn = sum(report.loss_rtn for report in reports)
    after = sum(report.loss_after for report in reports)
    if rtn <= 0 or after == rtn:
        return f"loss {after:.3g}"
    return f"loss {rtn:.3g} -> {after:.3g} ({after / rtn - 1:+.0%})"
