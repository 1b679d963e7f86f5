"""How much of the calibration text goes through a block at a time, and what happens where memory ends. Whole samples of L tokens.

The size depends on the device kind alone, so that the same run gives the same bytes; only where a GPU's memory runs out
is it divided, and the run says so.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

from convert.errors import ResourceError

T = TypeVar("T")

CHUNK_TOKENS = {"cpu": 2048, "cuda": 16384}

_divisor: ContextVar[int] = ContextVar("divisor of the chunk size", default=1)


def chunk_samples(seqlen: int, device: torch.device | str) -> int:
    """Samples in one forward pass, at least 1."""
    tokens = CHUNK_TOKENS.get(torch.device(device).type, CHUNK_TOKENS["cuda"])
    return max(1, tokens // _divisor.get() // seqlen)


def chunks(samples: int, seqlen: int, device: torch.device | str) -> Iterator[slice]:
    """Slices of the samples, one chunk after the other."""
    step = chunk_samples(seqlen, device)
    return (slice(start, min(start + step, samples)) for start in range(0, samples, step))


@contextmanager
def divided_by(divisor: int) -> Iterator[None]:
    """Inside, chunks are `divisor` times smaller."""
    token = _divisor.set(divisor)
    try:
        yield
    finally:
        _divisor.reset(token)


class ChunkMemory:
    """Runs the passes of one job over its text; halves the chunks, for good, each time the device's memory runs out."""

    def __init__(self, device: torch.device, seqlen: int | None) -> None:
        """seqlen: L, or None where no text runs through the model, so that there is nothing to make smaller."""
        self.device = device
        self.seqlen = seqlen
        self._divisor = 1

    def run(self, step: Callable[[], T], name: str) -> tuple[T, str]:
        """step() and a note, empty where it went as planned. `step` may be run again from its beginning.

        Raises ResourceError, naming the step, where one sample at a time is too much or the device failed for good.
        """
        note = ""
        while True:
            with divided_by(self._divisor):
                samples = 1 if self.seqlen is None else chunk_samples(self.seqlen, self.device)
                try:
                    return step(), note
                except torch.OutOfMemoryError as error:
                    if samples == 1:
                        raise ResourceError(self._out_of_memory(name)) from error
                except torch.AcceleratorError as error:
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    raise ResourceError(
                        f"{name}: {self.device} reported an error that it does not recover from ({reason}). The layers "
                        f"before are saved. Look at `nvidia-smi` and the system's log, then give the same command again."
                    ) from error
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._divisor *= 2
            note = f"{name}: memory ran out with {samples} samples at a time, so from here on the text goes in smaller chunks."

    def _out_of_memory(self, name: str) -> str:
        held = ""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            held = f" (at most {peak / 2**30:.1f} of {total / 2**30:.1f} GiB were ours, {free / 2**30:.1f} are free now)"
        return (
            f"{name}: {self.device} ran out of memory with the smallest chunk{held}. The layers before are saved. Free the "
            f"GPU and give the same command again, or start anew with fewer --samples, a smaller --seqlen or --device cpu."
        )
