"""What a step draws, on its way from the device to the host. B rows of the step, V vocabulary."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    scores: dict[int, "Scored"] = field(default_factory=dict)


class Scored(NamedTuple):
    """How likely the model finds n given tokens: log-probability (n,), rank from 1 (n,), likeliest ids (n, k) and theirs (n, k)."""

    logprobs: list[float]
    ranks: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


class PendingSample:
    """Sampled tokens on their way to the host: `wait()` blocks until they are there.

    tensors: token ids and largest logit of each row; log-probabilities, likeliest ids and theirs, where asked for.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._scores: dict[int, list[Tensor]] = {}
        device = next(tensor.device for tensor in tensors if tensor is not None)
        if device.type != "cuda":
            self._host, self._event = list(tensors), None
            return
        self._host = [None if t is None else download(t) for t in tensors]
        self._event = torch.cuda.Event()
        self._event.record()

    def add_scores(self, scores: Mapping[int, Sequence[Tensor]]) -> None:
        """Send along what `engine.serving.scores` found, by the place of the segment in the plan."""
        for place, tensors in scores.items():
            self._scores[place] = [download(t) for t in tensors] if self._event else list(tensors)
        if self._event is not None:
            self._event.record()

    def wait(self) -> Sampled:
        if self._event is not None:
            self._event.synchronize()
        token_ids, peaks, *rest = (None if t is None else t.tolist() for t in self._host)
        assert token_ids is not None and peaks is not None
        scores = {place: Scored(*(t.tolist() for t in tensors)) for place, tensors in self._scores.items()}
        logprobs, top_ids, top_logprobs = (*rest, None, None, None)[:3]
        finite = [math.isfinite(peak) for peak in peaks]
        return Sampled(token_ids, finite, logprobs, top_ids, top_logprobs, scores)


class Greedy(NamedTuple):
    """The largest logit of each row (B,), NaN where any logit of it is, and its place (B,) int64."""

    peak: Tensor
    tokens: Tensor


def likeliest(logits: Tensor) -> Greedy:
    """The greedy choice from logits (B, V)."""
    return Greedy(*logits.max(dim=-1))
