"""Clipping: the range of each group, shrunk from both ends on its own, judged by the group's block of the Gram matrix.

N out features, K in features, g group size, G = K / g groups, C candidates of column scales, P pairs of shrink factors.
"""

import torch
from torch import Tensor

from kernels.int4 import qparams
from kernels.search.clip import choose_ranges
from quant.statistics.gram import diagonal_blocks

PUBLISHED_STEPS = 10  # AWQ as published: the absolute maximum times 1, 0.95, ... 0.55


def shrink_pairs(steps: int, lowest: float, device: torch.device) -> Tensor:
    """All pairs of `steps` factors from 1 down to `lowest`, (1, 1) first: (steps^2, 2)."""
    factors = torch.linspace(1.0, lowest, steps, device=device)
    return torch.cartesian_prod(factors, factors) if steps > 1 else torch.ones(1, 2, device=device)


def banded_pairs(steps: int, lowest: float, device: torch.device) -> Tensor:
    """Pairs whose two factors are at most one step apart: most of what the full product finds, at a fraction of its cost."""
    factors = torch.linspace(1.0, lowest, steps)
    rows = [(factors[i], factors[j]) for i in range(steps) for j in range(steps) if abs(i - j) <= 1]
    return torch.tensor(rows, device=device)


def group_ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group, zero included: (..., N, K) -> two (..., N, G)."""
    grouped = weight.unflatten(-1, (-1, group_size))
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def search_clip(
    weight: Tensor,
    column_scales: Tensor,
    gram: Tensor,
    pairs: Tensor,
    group_size: int,
    bits: int,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and zero of the best range of each group: weight (N, K), column_scales (C, K), gram (K, K) or (K,) -> two (C, N, G).

    The weight that is quantized is weight * column_scales; the inputs shrink by as much, and the loss with them.
    """
    index, _ = choose_ranges(weight, column_scales, diagonal_blocks(gram, group_size), pairs, bits, symmetric)
    grouped = weight.unflatten(-1, (-1, group_size))
    scales, zeros = [], []
    for c, column_scale in enumerate(column_scales):  # one at a time, so that no (C, N, K) tensor arises
        scaled = grouped * column_scale.view(-1, group_size)
        low, high = scaled.amin(-1).clamp(max=0), scaled.amax(-1).clamp(min=0)
        factors = pairs[index[c]]
        scale, zero = qparams(low * factors[..., 0], high * factors[..., 1], bits, symmetric)
        scales.append(scale)
        zeros.append(zero)
    return torch.stack(scales), torch.stack(zeros)


def search_published_clip(
    weight: Tensor, gram: Tensor, group_size: int, bits: int, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """AWQ's clip: values beyond +-m are clamped, m = 1, 0.95, ... of the group's absolute maximum. Returns scale, zero (N, G).

    The published code measures the group's output on sampled tokens; over all tokens that is exactly the Gram form.
    """
    rows = weight.shape[0]
    blocks = diagonal_blocks(gram, group_size)
    grouped = weight.view(rows, -1, group_size).transpose(0, 1).contiguous()  # (G, N, g)
    top = grouped.abs().amax(-1, keepdim=True)
    best = torch.full_like(top, torch.inf)
    best_scale, best_zero = torch.ones_like(top), torch.zeros_like(top)
    for step in range(PUBLISHED_STEPS):
        limit = top * (1 - 0.5 * step / PUBLISHED_STEPS)
        clipped = grouped.clamp(-limit, limit)
        low, high = clipped.amin(-1, keepdim=True), clipped.amax(-1, keepdim=True)
        scale, zero = qparams(low, high, bits, symmetric)
        codes = (clipped / scale).round_().clamp_(-zero, 2**bits - 1 - zero)
        delta = codes.mul_(scale).sub_(grouped)
        loss = torch.matmul(delta, blocks).mul_(delta).sum(-1, keepdim=True)
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale[..., 0].t().contiguous(), best_zero[..., 0].t().contiguous()
