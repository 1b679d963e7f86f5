"""Targets toward the float stream: as far as two halves of the text agree, and no farther than noise allows."""

import torch

from quant.search.rounding.targets import CrossSums, move_targets
from quant.settings import SolverSteps
from quant.statistics.gram import observe


def regression(
    tokens: int, signal: float, seed: int = 0
) -> tuple[torch.Tensor, CrossSums, torch.Tensor, torch.Tensor]:
    """Inputs (S, L, K), sums of errors e = x B^T + noise, B (N, K), G of fresh inputs of the same kind."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(48, generator=generator))
    x = torch.randn(tokens // 16, 16, 48, generator=generator) * sizes
    true = signal * torch.randn(24, 48, generator=generator)
    errors = x @ true.t() + 3.0 * torch.randn(tokens // 16, 16, 24, generator=generator)
    halves = [errors[k::2].flatten(0, 1).t() @ x[k::2].flatten(0, 1) / (tokens // 2) for k in range(2)]
    return x, CrossSums(torch.stack(halves)), true, torch.diag(sizes**2)


def risk(delta: torch.Tensor, true: torch.Tensor, gram: torch.Tensor) -> float:
    """What is left of the error on other text."""
    return float((((delta - true) @ gram) * (delta - true)).sum())


def test_a_shared_error_is_corrected_and_noise_is_not() -> None:
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    for signal in (0.0, 0.1, 1.0):
        x, cross, true, gram = regression(256, signal)
        target, shares = move_targets(weight, observe([x], "x"), cross, (8, 16), 1.0, SolverSteps().ridges)
        none, left = risk(torch.zeros_like(true), true, gram), risk(target - weight, true, gram)
        everything = risk(
            cross.halves.mean(0) @ torch.linalg.inv(x.flatten(0, 1).t() @ x.flatten(0, 1) / 256), true, gram
        )
        assert left < 0.6 * everything or signal == 1.0
        assert left < none + 0.1 * everything  # at worst, a little noise is taken for signal
        assert all(0 <= share <= 1 for share in shares)
        if signal == 1.0:
            assert left < 0.1 * none


def test_the_most_that_may_be_gone_is_kept() -> None:
    x, cross, _, _ = regression(1024, 1.0)
    weight = torch.zeros(24, 48)
    stats = observe([x], "x")
    assert max(move_targets(weight, stats, cross, (24,), 0.25, SolverSteps().ridges)[1]) == 0.25
    target, shares = move_targets(
        weight,
        stats,
        CrossSums(cross.halves * torch.tensor([1.0, -1.0]).view(2, 1, 1)),
        (24,),
        1.0,
        SolverSteps().ridges,
    )
    assert torch.equal(target, weight) and shares == [0.0]
