"""The error that a block takes over from the blocks before it, as far as the block's own streams predict it.

S samples, L tokens a sample, H hidden size, T = S * L tokens. The quantized stream has an error where a block begins, and the float
block leaves it an error e = Y - F: Y is the float stream after the block, F the float block on the quantized inputs X. Learned
rounding can only undo the part of e that X and F predict. So its target is F + A [X / rms X, F / rms F], a ridge regression of e.
"""

import torch
from torch import Tensor

from quant.statistics.gram import damped, fast_products

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the mean of the features' Gram diagonal
_HEAVY = 4.0  # times the median power: tokens above it count for less, so that a few do not decide


def predicted_output(f: Tensor, x: Tensor, y: Tensor, metric: Tensor | None, part: int) -> Tensor:
    """F with the predictable part of Y - F added: (S, L, H), the dtype of y.

    Args: f, x, y: (S, L, H); metric: (H, H), what an error is multiplied by before it is squared; part: samples at a time.
    The ridge is the one that leaves least of the error of the odd samples when fitted on the even ones, and the other way round; F comes back
    as it is where none leaves less than all, or where there are no two samples.
    """
    if len(x) < 2:
        return f
    power = y.float().pow(2).mean(-1)
    weight = (_HEAVY * power.median() / power.clamp(min=1e-30)).clamp(max=1)
    square = _squared(metric, y)
    with fast_products():
        halves = [_sums(f, x, y, weight, part, parity) for parity in (0, 1)]
        total = sum(float((square * error).sum()) for _, _, error in halves)
        best, least = None, total
        for ridge in RIDGES:
            left = 0.0
            for (gram, cross, _), (other, cross_other, error) in zip(halves, reversed(halves), strict=True):
                a = _solve(gram, cross, ridge)
                mixed = cross_other.t() @ a
                left += float((square * (error - mixed - mixed.t() + a.t() @ other @ a)).sum())
            if left < least:
                best, least = ridge, left
        if best is None:
            return f
        (gram, cross, _), (other, cross_other, _) = halves
        a = _solve(gram + other, cross + cross_other, best)
        pieces = [
            f[i : i + part].float() + _features(f[i : i + part], x[i : i + part]) @ a
            for i in range(0, len(x), part)
        ]
    out = torch.cat(pieces).to(y.dtype)
    return out if bool(out.isfinite().all()) else f


def _squared(metric: Tensor | None, y: Tensor) -> Tensor:
    """M M^T in float32, the identity without a metric."""
    if metric is None:
        return torch.eye(y.shape[-1], device=y.device)
    wide = metric.to(y.device).float()
    return wide @ wide.t()


def _features(f: Tensor, x: Tensor) -> Tensor:
    """(s, L, H) twice -> (s, L, 2 H), each token at unit power."""
    return torch.cat(
        [h * h.pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt() for h in (x.float(), f.float())], -1
    )


def _sums(
    f: Tensor, x: Tensor, y: Tensor, weight: Tensor, part: int, parity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Over every second sample, tokens weighted: Gram of the features (2 H, 2 H), features with e (2 H, H), e with e (H, H)."""
    hidden = y.shape[-1]
    sizes = ((2 * hidden, 2 * hidden), (2 * hidden, hidden), (hidden, hidden))
    gram, cross, error = (torch.zeros(size, device=y.device) for size in sizes)
    for start in range(0, len(x), part):
        index = torch.arange(start, min(start + part, len(x)), device=y.device)
        index = index[index % 2 == parity]
        if not len(index):
            continue
        features = _features(f[index], x[index]).flatten(0, 1)
        missing = (y[index].float() - f[index].float()).flatten(0, 1)
        weighted = weight[index].flatten()[:, None]
        gram += features.t() @ (features * weighted)
        cross += features.t() @ (missing * weighted)
        error += missing.t() @ (missing * weighted)
    return gram, cross, error


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    found: Tensor = torch.linalg.solve(damped(gram, ridge), cross)
    return found
