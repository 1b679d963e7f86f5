"""What a step draws, on its way from the device to the host. B rows of the step, V vocabulary."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.serving.transfer import download


@dataclass(frozen=True)
class Sampled:
    """What the host learns of a step; one entry a row. `finite` is False where the logits held a NaN or an infinity."""

    token_ids: list[int]
    finite: list[bool]
    logprobs: list[float] | None = None
    top_ids: list[list[int]] | None = None
    top_logprobs: list[list[float]] | None = None


class PendingSample:
    """Sampled tokens on their way to the host: `wait()` blocks until they are there.

    tensors: token ids and largest logit of each row; log-probabilities, likeliest ids and theirs, where asked for.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        device = next(tensor.device for tensor in tensors if tensor is not None)
        if device.type != "cuda":
            self._host, self._event = list(tensors), None
            return
        self._host = [None if t is None else download(t) for t in tensors]
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> Sampled:
        if self._event is not None:
            self._event.synchronize()
        token_ids, peaks, *rest = (None if t is None else t.tolist() for t in self._host)
        assert token_ids is not None and peaks is not None
        return Sampled(token_ids, [math.isfinite(peak) for peak in peaks], *rest)


class Greedy(NamedTuple):
    """The largest logit of each row (B,), NaN where any logit of it is, and its place (B,) int64."""

    peak: Tensor
    tokens: Tensor


def likeliest(logits: Tensor) -> Greedy:
    """The greedy choice from logits (B, V)."""
    return Greedy(*logits.max(dim=-1))
