"""What a GPU does on fewer rows or in larger steps than a CPU, tried here on the CPU: how little it changes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from toy_blocks import block_of, config_of, stream_of

from kernels.search import sweeps
from quant.block_task import Streams
from quant.blocks import quantize_block
from quant.config import QuantConfig
from quant.recipes import recipe_named
from quant.search.rounding import targets
from quant.search.rounding.targets import CrossSums, move_targets
from quant.settings import Effort, Efforts
from quant.statistics.gram import inverse_factor, observe


def log_losses(preset: str, effort: Effort) -> torch.Tensor:
    """The logarithm of each linear's loss, relative to plain rounding, at this effort."""
    config, recipe = config_of("llama"), replace(recipe_named(preset), efforts=Efforts(cpu=effort))
    found = []
    for seed in (0, 1):
        x = stream_of(config, samples=8, seed=seed)
        quant = QuantConfig(preset=recipe, group_size=32)
        with torch.no_grad():
            result = quantize_block(
                block_of(config, seed), config, quant, Streams(x, 0.98 * x), "cpu", torch.float32
            )
        found += [report.loss_after / report.loss_rtn for report in result.reports]
    return torch.tensor(found).log()


@pytest.mark.parametrize("preset", ["fast", "default"])
def test_candidates_judged_on_an_eighth_of_the_rows_lose_little(preset: str) -> None:
    effort = replace(Efforts().cpu, alpha_steps=20, score_rows=1 << 30)
    change = log_losses(preset, replace(effort, score_rows=32)) - log_losses(preset, effort)
    # 32 rows of a stack are far fewer than the 1,024 of a GPU; single linears gain or lose a few per cent
    assert abs(float(change.mean())) < 0.02 and float(change.max()) < 0.1


def test_two_sweeps_of_descent_do_what_three_do() -> None:
    effort = replace(Efforts().cpu, rounds=2, sweeps=3)
    change = log_losses("default", replace(effort, sweeps=2)) - log_losses("default", effort)
    assert abs(float(change.mean())) < 0.01 and float(change.max()) < 0.03


def sweep_problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, 320, generator=generator)
    weight = torch.randn(320, 20, generator=generator)
    scale = torch.rand(320, 20, generator=generator) * 0.2 + 0.05
    return x.t() @ x / 512, weight, scale, torch.full((320, 20), 8.0)


def both_spans(monkeypatch: pytest.MonkeyPatch, run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What `run` gives when every block of columns is spread at once, and when three are spread together."""
    found = []
    for blocks in (1, 3):  # 320 columns are five blocks: the last span is not full
        monkeypatch.setattr(sweeps, "_span", lambda cols, block, is_cuda, n=blocks: min(n * block, cols))
        found.append(run())
    return found


def test_errors_spread_over_several_blocks_at_once_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, weight, scale, zero = sweep_problem()
    factor = inverse_factor(gram, 0.01)
    assert factor is not None
    one, three = both_spans(
        monkeypatch, lambda: sweeps.gptq_sweep(weight.clone(), factor[0], scale, zero, 15)
    )
    assert float((one != three).float().mean()) < 0.01  # sums in another order may flip a rounding


def test_descent_keeps_the_whole_gradient_whatever_is_spread_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, weight, scale, zero = sweep_problem()
    start = (weight / scale).round().clamp(-8, 7)

    def run() -> torch.Tensor:
        codes, gradient = start.clone(), gram @ (start * scale - weight)
        sweeps.descent_sweep(codes, gradient, gram, scale, zero, 15)
        torch.testing.assert_close(gradient, gram @ (codes * scale - weight), rtol=1e-3, atol=1e-3)
        return codes

    one, three = both_spans(monkeypatch, run)
    assert float((one != start).float().mean()) > 0.02  # it moved something
    assert float((one != three).float().mean()) < 0.01


def test_a_sample_of_rows_chooses_the_same_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(8, 200, 64, generator=generator)
    stats, weight = observe([x], "x"), torch.randn(96, 64, generator=generator)
    missing = 0.1 * torch.randn(96, 64, generator=generator)
    noise = 0.02 * torch.randn(2, 96, 64, generator=generator)
    cross = CrossSums(missing @ stats.gram + noise)
    ridges = (0.003, 0.03, 0.3)
    whole, shares = move_targets(weight, stats, cross, [64, 32], 1.0, ridges)
    monkeypatch.setattr(targets, "_sample", lambda rows, device: [4, 2])
    sampled, other = move_targets(weight, stats, cross, [64, 32], 1.0, ridges)
    assert shares == pytest.approx(other, abs=0.02) and min(shares) > 0.5
    torch.testing.assert_close(sampled, whole, rtol=0, atol=0.01)
