"""The frontier of a run: records of finished blocks, and hidden states before the next one, so that a killed run goes on.

A saved state is one safetensors file and, written after it, one JSON file with its digest. Saving follows the clock: a run
spends at most about a tenth of its time on it. What is saved does not depend on when, so neither do the final bytes.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from convert.folder.files import atomic_write, remove_temporaries, safetensors_chunks, sha256_file, write_json
from convert.hf.safetensors_files import read_header, read_tensor

SAVE_SHARE = 0.1  # of the run's time that saving may take
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
        write_json(self._record_path(index), record)

    def is_due(self, tensors: dict[str, Tensor]) -> bool:
        """Whether saving these is cheap by now."""
        return self._clock.is_due(tensors)

    def save(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Save the state before block `index`, then drop older ones."""
        with self._clock.saving():
            path = self._path(index)
            _, digest = atomic_write(path, safetensors_chunks(tensors))
            write_json(path.with_suffix(".json"), {"index": index, "sha256": digest})
            for old in self._indices():
                if old != index:
                    self._remove(old)

    def resume(self, has_files: Callable[[int], bool]) -> Resumption:
        """The newest whole state before which every block has its record and its files. Damaged ones are passed over."""
        for index in sorted(self._indices(), reverse=True):
            path = self._path(index)
            mark = read_record(path.with_suffix(".json"))
            if mark is not None and path.is_file() and mark.get("sha256") == sha256_file(path):
                records = [read_record(self._record_path(i)) for i in range(index)]
                whole = [r for r in records if r is not None]
                if len(whole) == index and all(has_files(i) for i in range(index)):
                    tensors = {name: read_tensor(info) for name, info in read_header(path).items()}
                    return Resumption(index, tensors, whole)
                self.notes.append(f"a file of a layer before {index} is damaged: the run begins anew.")
            elif mark is not None:
                self.notes.append(f"the saved state before layer {index} is damaged: it is not used.")
            self._remove(index)
        return Resumption(0, None, [])

    def _path(self, index: int) -> Path:
        return self.folder / f"stream-{index:05d}.safetensors"

    def _record_path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.json"

    def _indices(self) -> list[int]:
        names = {path.stem for path in self.folder.glob("stream-*.*")}
        return [int(name[7:]) for name in names if name[7:].isdigit()]

    def _remove(self, index: int) -> None:
        for path in (self._path(index).with_suffix(".json"), self._path(index)):
            path.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object of the work folder, or None where it is absent, cut or of another kind: its work is then done again."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
