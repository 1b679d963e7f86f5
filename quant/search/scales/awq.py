"""AWQ's channel scales: candidates from activation and weight magnitudes, and their choice by the Gram form of the loss.

N out features, K in features, g group size, G = K / g groups, C candidates. Lin et al., AWQ, 2023.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.int4 import dequantize, quantize_codes
from quant.search.scales.clip import search_clip
from quant.search.scales.folding import SCALE_RANGE, Fold
from quant.statistics.gram import fast_products, loss_rows

_CANDIDATE_BYTES = 1 << 28  # memory of the (c, N, K) tensors that are scored at a time


def exponents(steps: int) -> list[tuple[float, bool]]:
    """The published grid: alpha = 0, 1/steps, ... below 1, each without and with the weight term."""
    return [(step / steps, duo) for step in range(steps) for duo in (False, True)]


def candidates(
    weight: Tensor, mean_abs: Tensor, group_size: int, fold: Fold, grid: Sequence[tuple[float, bool]]
) -> Tensor:
    """Channel scales x^alpha, or x^alpha / (w^(1 - alpha) + 1e-4) with the weight term, normalised: (C, K'), snapped.

    x is the mean |input| of a channel; w the mean over rows of |weight| relative to the largest of its group.
    Normalised by sqrt(max * min), kept within 1/64 .. 64; whatever is not finite becomes 1. The first row is 1.
    """
    rows, cols = weight.shape
    grouped = weight.abs().view(rows, -1, group_size)
    relative = (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).mean(0).view(cols)
    x, w = fold.shrink(mean_abs), fold.shrink(relative)
    scales = [fold.snap(torch.ones_like(x))]
    for alpha, duo in grid:
        scale = (x.pow(alpha) / (w.pow(1 - alpha) + 1e-4) if duo else x.pow(alpha)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        scale = torch.where(scale.isfinite(), scale, torch.ones_like(scale)).clamp(
            1 / SCALE_RANGE, SCALE_RANGE
        )
        scales.append(fold.snap(scale))
    return torch.stack(scales)


def score_candidates(
    weight: Tensor,
    column_scales: Tensor,
    gram: Tensor,
    pairs: Tensor,
    group_size: int,
    bits: int,
    segments: Sequence[int],
    symmetric: bool = False,
) -> Tensor:
    """Loss tr(dW G dW^T) of each candidate after clipping with `pairs`: (C, number of segments) float32.

    weight (N, K), column_scales (C, K), gram (K, K) or (K,), all float32; segments: rows of each linear of the stack.
    """
    step = max(1, _CANDIDATE_BYTES // (4 * weight.numel()))
    losses = []
    with fast_products():
        for part in column_scales.split(step):
            scales, zeros = search_clip(weight, part, gram, pairs, group_size, bits, symmetric)
            for c, column_scale in enumerate(part):
                codes = quantize_codes(weight * column_scale, scales[c], zeros[c], group_size, bits)
                delta = dequantize(codes, scales[c], zeros[c], group_size).div_(column_scale).sub_(weight)
                rows = loss_rows(delta, gram)
                losses.append(torch.stack([part.sum() for part in rows.split(list(segments))]))
    return torch.stack(losses)
