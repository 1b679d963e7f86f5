"""Targets moved toward the float stream: the linear map of a quantized stream's inputs that best gives the float model's outputs.

M tokens, N out features, K in features. A regression of N x K numbers on few tokens: what it would promise on the text that it was
fitted on says little, so that how far to go is decided by how well two halves of the text agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.products import linear
from quant.stage_clock import stage
from quant.statistics.gram import InputStatistics, damped, outer_sum


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
    first, second = cross.halves
    mean = cross.halves.mean(0)
    best_gain = [0.0] * len(rows)
    best_share = [0.0] * len(rows)
    moved = list(weight.split(list(rows)))
    for ridge in ridges:
        lower, info = torch.linalg.cholesky_ex(damped(stats.gram, ridge))
        if int(info):
            continue
        # the inverse once: products with it are far quicker than solving for every row
        inverse = torch.cholesky_inverse(lower)
        step, step_first = linear(mean, inverse), linear(first, inverse)
        agreement = (step_first * second).sum(1)  # (N,)
        damping = ridge * stats.gram.diagonal().mean()
        power = ((mean - damping * step) * step).sum(1)  # D G = C - lambda D
        parts = zip(
            weight.split(list(rows)),
            step.split(list(rows)),
            agreement.split(list(rows)),
            power.split(list(rows)),
            strict=True,
        )
        for k, (old, move, agrees, costs) in enumerate(parts):
            total, size = float(agrees.sum()), float(costs.sum())
            share = min(most, total / size) if size > 0 else 0.0
            gain = 2 * share * total - share * share * size
            if share > 0 and gain > best_gain[k]:
                best_gain[k], best_share[k] = gain, share
                moved[k] = old + share * move
    target = torch.cat(moved)
    if not bool(target.isfinite().all()):
        return weight, [0.0] * len(rows)
    return target, best_share
