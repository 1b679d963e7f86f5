"""The frontier of a run: records of finished blocks, and hidden states before the next one, so that a killed run goes on.

A saved state is one safetensors file and, written after it, one JSON file with its digest. Saving follows the clock: a run
spends at most about 3 % of its time on it. What is saved does not depend on when, so neither do the final bytes.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from convert.folder.files import remove_temporaries
from quant.stage_clock import stage
from quant.state.saved_tensors import (
    load_tensors,
    mark_of,
    read_record,
    read_signed_record,
    remove_tensors,
    save_tensors,
    write_signed_record,
)

SAVE_SHARE = 0.03  # of the run's time that saving may take
DISK_BYTES_PER_S = 1e9  # guess for the first save: writing and hashing on a good disk


class SaveClock:
    """Says when the next save is due: saving may take SAVE_SHARE of the time. The first is judged by its size."""

    def __init__(self) -> None:
        self._saved_at = time.monotonic()
        self._cost_s = 0.0

    def is_due(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether enough time has passed since the last save for another one to be cheap."""
        cost_s = max(self._cost_s, sum(tensor.nbytes for tensor in tensors.values()) / DISK_BYTES_PER_S)
        return (time.monotonic() - self._saved_at) * SAVE_SHARE >= cost_s

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save: how long it takes is the cost of the next."""
        begin = time.monotonic()
        yield
        self._saved_at = time.monotonic()
        self._cost_s = self._saved_at - begin


@dataclass(frozen=True)
class Resumption:
    """Where to go on: the first block that is not done, the tensors before it (None: begin anew), records of those done."""

    first: int
    tensors: dict[str, Tensor] | None
    records: list[dict[str, Any]]


class Frontier:
    """Saves and finds the state of a run in its work folder. `notes` say what was found damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._clock = SaveClock()
        remove_temporaries(folder)

    def record(self, index: int, record: dict[str, Any]) -> None:
        """Keep the record of a finished block. Equal runs keep equal records: no times in it."""
        write_signed_record(self._record_path(index), record)

    def is_due(self, tensors: dict[str, Tensor]) -> bool:
        """Whether saving these is cheap by now."""
        return self._clock.is_due(tensors)

    def save_if_due(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Save the state before block `index` where that is cheap by now."""
        if self.is_due(tensors):
            with stage("save the hidden states"):
                self.save(index, tensors)

    def save(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Save the state before block `index`, then drop older ones."""
        with self._clock.saving():
            save_tensors(self._path(index), tensors, index=index)
            for old in self._indices():
                if old != index:
                    remove_tensors(self._path(old))

    def resume(self, has_files: Callable[[int], bool]) -> Resumption:
        """The newest whole state before which every block has its record and its files. Damaged ones are passed over."""
        for index in sorted(self._indices(), reverse=True):
            path = self._path(index)
            has_mark, saved = read_record(mark_of(path)) is not None, load_tensors(path)
            if saved is not None:
                records = [read_signed_record(self._record_path(i)) for i in range(index)]
                whole = [r for r in records if r is not None]
                if len(whole) == index and all(has_files(i) for i in range(index)):
                    return Resumption(index, saved.tensors, whole)
                self.notes.append(f"a file of a layer before {index} is damaged: the run begins anew.")
            elif has_mark:
                self.notes.append(f"the saved state before layer {index} is damaged: it is not used.")
            remove_tensors(path)
        return Resumption(0, None, [])

    def _path(self, index: int) -> Path:
        return self.folder / f"stream-{index:05d}.safetensors"

    def _record_path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.json"

    def _indices(self) -> list[int]:
        names = {path.stem for path in self.folder.glob("stream-*.*")}
        return [int(name[7:]) for name in names if name[7:].isdigit()]
