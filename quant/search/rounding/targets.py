"""Targets moved toward the float stream: the linear map of a quantized stream's inputs that best gives the float model's outputs.

M tokens, N out features, K in features. A regression of N x K numbers on few tokens: what it would promise on the text that it was
fitted on says little, so that how far to go is decided by how well two halves of the text agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.products import linear
from quant.stage_clock import stage
from quant.statistics.gram import InputStats, damped


@dataclass(frozen=True)
class CrossSums:
    """C = (Y - X W^T)^T X / M of the even samples and of the odd ones: (2, N, K) float32, Y the float stream's outputs."""

    halves: Tensor


@stage("moved targets")
def move_targets(
    weight: Tensor,
    stats: InputStats,
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
