"""The state of an end-to-end pass in the work folder of its run, and how far it is, on the terminal."""

from pathlib import Path

from torch import Tensor

from convert.folder.files import atomic_write, safetensors_chunks, sha256_file, write_json
from convert.hf.safetensors_files import read_header, read_tensor
from quant.progress import Progress
from quant.state.frontier import SaveClock, read_record


class PassWork:
    """Saves the pass where about a tenth of its time pays for that, and at its end. A damaged state is passed over, with a warning."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._path = folder / "pass.safetensors"
        self._mark = self._path.with_suffix(".json")
        self._progress = progress
        self._clock = SaveClock()

    def load(self) -> dict[str, Tensor] | None:
        """The tensors saved last, or None."""
        mark = read_record(self._mark)
        if mark is None or not self._path.is_file():
            return None
        if mark.get("sha256") != sha256_file(self._path):
            self._progress.warn("the saved state of the end-to-end pass is damaged: it begins anew.")
            return None
        self._progress.say(f"going on with the end-to-end pass behind step {mark['done']}")
        return {name: read_tensor(info) for name, info in read_header(self._path).items()}

    def reached(self, done: int, steps: int, kl: float, state: dict[str, Tensor]) -> None:
        """Show the step, and save it where that is due."""
        self._progress.step(done, steps, f"KL {kl:.4f}")
        if done < steps and not self._clock.is_due(state):
            return
        with self._clock.saving():
            self._mark.unlink(missing_ok=True)  # it speaks of the state before
            _, digest = atomic_write(self._path, safetensors_chunks(state))
            write_json(self._mark, {"done": done, "sha256": digest})
