"""The state of an end-to-end pass in the work folder of its run, and how far it is, on the terminal."""

from pathlib import Path

from torch import Tensor

from quant.progress import Progress
from quant.state.frontier import SaveClock
from quant.state.saved_tensors import is_marked, load_tensors, save_tensors


class PassWork:
    """Saves the pass where about a tenth of its time pays for that, and at its end. A damaged state is passed over, with a warning."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._path = folder / "pass.safetensors"
        self._progress = progress
        self._clock = SaveClock()

    def load(self) -> dict[str, Tensor] | None:
        """The tensors saved last, or None."""
        if not is_marked(self._path):
            return None
        if (saved := load_tensors(self._path)) is None:
            self._progress.warn("the saved state of the end-to-end pass is damaged: it begins anew.")
            return None
        self._progress.say(f"going on with the end-to-end pass after step {saved.facts['done']}")
        return saved.tensors

    def reached(self, done: int, steps: int, kl: float, state: dict[str, Tensor]) -> None:
        """Show the step, and save it where that is due."""
        self._progress.step(done, steps, f"KL {kl:.4f}")
        if done < steps and not self._clock.is_due(state):
            return
        with self._clock.saving():
            save_tensors(self._path, state, done=done)
