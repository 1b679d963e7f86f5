"""The clip search against trying every pair, one row and group at a time; candidates of channel scales."""

import torch

from kernels.int4 import dequantize, qparams, quantize_codes
from quant.search.scales.awq import candidates, exponents, score_candidates
from quant.search.scales.clip import banded_pairs, search_clip, search_published_clip, shrink_pairs
from quant.search.scales.folding import norm_fold
from quant.statistics.gram import loss_rows

CPU = torch.device("cpu")


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 64, generator=generator)
    weight[torch.rand(10, 64, generator=generator) < 0.02] *= 6  # outliers, so that clipping pays
    x = torch.randn(300, 64, generator=generator) * torch.exp(torch.randn(64, generator=generator))
    return weight, x.t() @ x / 300


def group_loss(weight: torch.Tensor, gram: torch.Tensor, low: float, high: float, bits: int) -> float:
    scale, zero = qparams(torch.tensor(low), torch.tensor(high), bits)
    codes = ((weight / scale).round() + zero).clamp(0, 2**bits - 1)
    delta = (codes - zero) * scale - weight
    return float(delta @ gram @ delta)


def test_each_group_gets_the_pair_that_loses_least() -> None:
    weight, gram = problem()
    pairs = shrink_pairs(4, 0.55, CPU)
    scales, zeros = search_clip(weight, torch.ones(1, 64), gram, pairs, 32, 3)
    for row in range(10):
        for group in range(2):
            at = slice(32 * group, 32 * group + 32)
            w, block = weight[row, at], gram[at, at]
            low, high = float(w.min()), float(w.max())
            best = min(group_loss(w, block, low * float(a), high * float(b), 3) for a, b in pairs)
            codes = quantize_codes(
                w[None], scales[0, row, group].view(1, 1), zeros[0, row, group].view(1, 1), 32, 3
            )
            taken = (
                dequantize(codes, scales[0, row, group].view(1, 1), zeros[0, row, group].view(1, 1), 32)[0]
                - w
            )
            assert float(taken @ block @ taken) <= best * (1 + 1e-4)


def test_the_published_clip_is_never_worse_than_none_by_its_own_measure() -> None:
    weight, gram = problem()
    gram = torch.block_diag(gram[:32, :32], gram[32:, 32:])
    scale, zero = search_published_clip(weight, gram, 32, 3)
    clipped = dequantize(quantize_codes(weight, scale, zero, 32, 3), scale, zero, 32)
    grouped = weight.view(10, 2, 32)
    scale, zero = qparams(grouped.amin(-1), grouped.amax(-1), 3)
    plain = dequantize(quantize_codes(weight, scale, zero, 32, 3), scale, zero, 32)
    after, before = loss_rows(clipped - weight, gram), loss_rows(plain - weight, gram)
    assert bool((after <= before * (1 + 1e-5)).all()) and float(after.sum()) < 0.95 * float(before.sum())


def test_pairs_begin_with_no_clipping() -> None:
    for pairs in (shrink_pairs(5, 0.5, CPU), banded_pairs(5, 0.5, CPU), shrink_pairs(1, 0.5, CPU)):
        assert pairs[0].tolist() == [1.0, 1.0]
    assert len(shrink_pairs(5, 0.5, CPU)) == 25 and len(banded_pairs(5, 0.5, CPU)) == 13


def test_candidates_hold_the_published_grid_and_survive_dead_channels() -> None:
    weight, gram = problem()
    mean_abs = gram.diagonal().sqrt()
    mean_abs[3] = 0
    scales = candidates(weight, mean_abs, 32, norm_fold(torch.ones(64)), exponents(20))
    assert scales.shape == (41, 64) and bool((scales > 0).all()) and bool(scales.isfinite().all())
    assert bool((scales[0] == 1).all())
    assert float(scales.max()) <= 64 and float(scales.min()) >= 1 / 64 * (1 - 2**-10)


def test_a_candidate_is_scored_by_its_true_loss() -> None:
    weight, gram = problem()
    column_scales = torch.stack([torch.ones(64), torch.linspace(0.5, 2, 64)])
    losses = score_candidates(weight, column_scales, gram, shrink_pairs(1, 1.0, CPU), 32, 4, [4, 6])
    scaled = weight * column_scales[1]
    grouped = scaled.view(10, 2, 32)
    scale, zero = qparams(grouped.amin(-1), grouped.amax(-1), 4)
    delta = (
        dequantize(quantize_codes(scaled, scale, zero, 32, 4), scale, zero, 32) / column_scales[1] - weight
    )
    rows = ((delta.double() @ gram.double()) * delta.double()).sum(-1)
    torch.testing.assert_close(
        losses[1].double(), torch.stack([rows[:4].sum(), rows[4:].sum()]), rtol=1e-4, atol=0
    )
