"""Targets moved toward the float stream: the linear map of a quantized stream's inputs that best gives the float model's outputs.

M tokens, N out features, K in features. A regression of N x K numbers on few tokens: what it would promise on the text that it was
fitted on says little, so that how far to go is decided by how well two halves of the text agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.products import linear
from quant.stage_clock import stage
from quant.statistics.gram import InputStatistics, damped, exact_products, outer_sum

_SAMPLE_ROWS = 256  # of a linear, on a GPU


@dataclass(frozen=True)
class CrossSums:
    """C = (Y - X W^T)^T X / M of the even samples and of the odd ones: (2, N, K) float32, Y the float stream's outputs."""

    halves: Tensor


class CrossAccumulator:
    """Sums over chunks of samples that become `CrossSums`: (D, K) of the even samples and of the odd ones."""

    def __init__(self) -> None:
        self._sums: list[Tensor | None] = [None, None]
        self._samples = [0, 0]
        self._length = 1

    def add(
        self,
        first: int,
        inputs: Tensor,
        wanted: Tensor,
        given: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Take in a chunk whose first sample is the `first` of the text.

        inputs (s, L, K): X. wanted - given(X) (s, L, D) is what is missing; left out, given is the identity and D = K.
        """
        self._length = inputs.shape[1]
        for half in range(2):
            rows = slice((half + first) % 2, None, 2)
            x, y = inputs[rows].flatten(0, 1), wanted[rows].flatten(0, 1)
            if not len(x):
                continue
            product = outer_sum(y - (x if given is None else given(x)), x)
            before = self._sums[half]
            self._sums[half] = product if before is None else before + product
            self._samples[half] += len(inputs[rows])

    def sums(self, weight: Tensor | None) -> CrossSums | None:
        """The sums, multiplied by weight (N, D) where one is given; None where there are no two samples."""
        even, odd = self._sums
        if even is None or odd is None:
            return None
        halves = torch.stack([even / self._samples[0], odd / self._samples[1]]) / self._length
        return CrossSums(halves if weight is None else weight @ halves)


@stage("moved targets")
def move_targets(
    weight: Tensor,
    stats: InputStatistics,
    cross: CrossSums,
    rows: Sequence[int],
    most: float,
    ridges: Sequence[float],
) -> tuple[Tensor, list[float]]:
    """W + s C (G + lambda I)^-1, lambda and s (at most `most`) chosen for each linear; returns it with each s.

    ridges: values of lambda to try, as shares of the mean of G's diagonal.

    With D = C (G + lambda I)^-1 and D_a, C_b of the two halves, the error on other text falls by
    2 s tr(D_a C_b^T) - s^2 tr(D G D^T), in which no noise of the text meets itself.
    """
    sample = _sample(rows, weight.device)
    chosen = _choose(cross, stats.gram, rows, sample, most, ridges)
    if sample is not None:
        chosen = _complete(chosen, cross, stats.gram, rows)
    target = torch.cat(
        [
            part if choice.move is None else part + choice.share * choice.move
            for part, choice in zip(weight.split(list(rows)), chosen, strict=True)
        ]
    )
    if not bool(target.isfinite().all()):
        return weight, [0.0] * len(rows)
    return target, [choice.share for choice in chosen]


@dataclass(frozen=True)
class _Choice:
    """How far one linear's target moves, and with which ridge; gain: what the error on other text falls by; move: (N, K)."""

    ridge: float = 0.0
    share: float = 0.0
    gain: float = 0.0
    move: Tensor | None = None


def _sample(rows: Sequence[int], device: torch.device) -> list[int] | None:
    """For each linear of the stack the distance of the rows that decide on a GPU; None on a CPU, where all of them do."""
    return None if device.type == "cpu" else [max(1, count // _SAMPLE_ROWS) for count in rows]


def _choose(
    cross: CrossSums,
    gram: Tensor,
    rows: Sequence[int],
    sample: Sequence[int] | None,
    most: float,
    ridges: Sequence[float],
) -> list[_Choice]:
    """The ridge and share of each linear that gain most, judged by the rows of the sample. Without one the moves come as well."""
    steps = sample or [1] * len(rows)
    first, second = (
        torch.cat([part[::step] for part, step in zip(half.split(list(rows)), steps, strict=True)])
        for half in cross.halves
    )
    mean = (first + second) / 2
    counts = [-(-count // step) for count, step in zip(rows, steps, strict=True)]
    best = [_Choice() for _ in rows]
    for ridge in ridges:
        found = _regress(mean, first, gram, ridge, by_inverse=sample is None)
        if found is None:
            continue
        step, step_first = found
        agreement = (step_first * second).sum(1)  # (n,)
        power = ((mean - ridge * gram.diagonal().mean() * step) * step).sum(1)  # D G = C - lambda D
        sums = [torch.stack([part.sum() for part in value.split(counts)]) for value in (agreement, power)]
        moves = step.split(counts)
        for k, (total, size) in enumerate(torch.stack(sums, 1).tolist()):
            share = min(most, total / size) if size > 0 else 0.0
            gain = 2 * share * total - share * share * size
            if share > 0 and gain > best[k].gain:
                best[k] = _Choice(ridge, share, gain, moves[k] if sample is None else None)
    return best


def _regress(
    mean: Tensor, first: Tensor, gram: Tensor, ridge: float, *, by_inverse: bool
) -> tuple[Tensor, Tensor] | None:
    """C (G + lambda I)^-1 for the C of all samples and of the even ones, (n, K) each; None where G stays indefinite.

    by_inverse: for many rows, for which products with the inverse are far quicker than solving for each.
    """
    with exact_products():
        lower, info = torch.linalg.cholesky_ex(damped(gram, ridge))
        if int(info):
            return None
        if not by_inverse:
            solved = torch.cholesky_solve(torch.cat([mean, first]).t(), lower).t()
            return solved[: len(mean)], solved[len(mean) :]
        inverse = torch.cholesky_inverse(lower)
    return linear(mean, inverse), linear(first, inverse)


def _complete(
    chosen: Sequence[_Choice], cross: CrossSums, gram: Tensor, rows: Sequence[int]
) -> list[_Choice]:
    """The choices that a sample of rows has made, with the moves of all rows."""
    mean, done = cross.halves.mean(0).split(list(rows)), list(chosen)
    for ridge in {choice.ridge for choice in chosen if choice.share > 0}:
        with exact_products():
            inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(damped(gram, ridge))[0])
        for k, choice in enumerate(chosen):
            if choice.share > 0 and choice.ridge == ridge:
                done[k] = replace(choice, move=linear(mean[k], inverse))
    return done
