"""GPTQ against the textbook loop, descent against exhaustive moves, refit against least squares."""

from dataclasses import replace

import pytest
import torch

from kernels.int4 import qparams, quantize
from kernels.search.sweeps import descent_sweep, gptq_sweep
from quant.config import QuantConfig
from quant.recipes import recipe_named
from quant.search.rounding.compensation import act_order, compensated_costs, gptq_published, gptq_static
from quant.search.rounding.descent import descend, expand, refit_scales
from quant.search.scale_and_clip import scale_and_clip
from quant.search.scales.folding import no_fold, norm_fold
from quant.search.solve import solve
from quant.search.stack import Stack, round_to_nearest
from quant.statistics.gram import damped, loss_rows, observe


def problem(rows: int = 24, cols: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, cols, generator=generator) @ torch.randn(cols, cols, generator=generator) / cols**0.5
    return torch.randn(rows, cols, generator=generator), x.t() @ x / 400


def textbook(
    weight: torch.Tensor, gram: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, size: int
) -> torch.Tensor:
    """Frantar et al., one column at a time, with the inverse Hessian updated after every column; float64."""
    return textbook_with_errors(weight, gram, scale, zero, size)[0]


def textbook_with_errors(
    weight: torch.Tensor, gram: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K), and by how much each column was rounded when its turn came, (N, K)."""
    work, inverse = weight.double().clone(), torch.linalg.inv(gram.double())
    codes, errors = torch.zeros_like(work), torch.zeros_like(work)
    for j in range(weight.shape[1]):
        s, z = scale[:, j // size].double(), zero[:, j // size].double()
        codes[:, j] = (work[:, j] / s).round().clamp(-z, 15 - z)
        errors[:, j] = work[:, j] - codes[:, j] * s
        error = errors[:, j] / inverse[j, j]
        work -= error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1  # the column is done; it no longer takes part
    return codes, errors


def test_static_groups_give_the_codes_of_the_textbook_loop() -> None:
    weight, gram = problem()
    grouped = weight.view(24, 2, 32)
    scale, zero = qparams(grouped.amin(-1), grouped.amax(-1), 4)
    found = gptq_static(weight, gram, scale, zero, 32, 4, damping=0.01)
    assert found is not None
    order = act_order(gram)
    steady = damped(gram, 0.01)[order][:, order]
    expected = torch.empty_like(weight, dtype=torch.float64)
    # groups of permuted columns: hand the loop one group per column
    per_column = scale[:, order // 32], zero[:, order // 32]
    expected[:, order] = textbook(weight[:, order], steady, *per_column, size=1)
    assert (found[0].double() != expected).float().mean() < 0.002  # float32 may break a tie the other way


def test_the_costs_behind_compensation_add_up_to_the_loss() -> None:
    """tr(dW G dW^T) of compensated codes is the sum of each column's own rounding error times its cost."""
    weight, gram = problem(seed=8)
    grouped = weight.view(24, 2, 32)
    scale, zero = qparams(grouped.amin(-1), grouped.amax(-1), 4)
    costs = compensated_costs(gram)
    assert costs is not None and bool((costs <= damped(gram, 0.01).diagonal() * (1 + 1e-5)).all())
    order, steady = act_order(gram), damped(gram, 0.01)
    codes, errors = textbook_with_errors(
        weight[:, order], steady[order][:, order], scale[:, order // 32], zero[:, order // 32], size=1
    )
    delta = codes * scale[:, order // 32].double() - weight[:, order].double()
    loss = ((delta @ steady[order][:, order].double()) * delta).sum(-1)
    torch.testing.assert_close((errors.square() * costs[order].double()).sum(-1), loss, rtol=1e-4, atol=0)
    assert compensated_costs(torch.full((32, 32), torch.nan)) is None


def test_ranges_and_scales_are_chosen_for_what_compensation_leaves() -> None:
    """On inputs that share a few directions, choices by these costs end lower than choices by the inputs as they are."""
    generator = torch.Generator().manual_seed(9)
    shared = torch.randn(16, 256, 6, generator=generator) @ torch.randn(6, 64, generator=generator)
    own = torch.randn(16, 256, 64, generator=generator) * torch.logspace(-1.5, 0.5, 64)
    stats = observe([shared + own], "toy")
    weight = torch.randn(96, 64, generator=generator)
    recipe, config = recipe_named("default"), QuantConfig(group_size=32)
    plan, effort = recipe.steps, recipe.effort_on("cpu")
    stack, fold = Stack(weight, ("up",), (96,)), norm_fold(torch.ones(64))
    plain = round_to_nearest(weight, config)
    losses = {}
    for name, how in (("costs", plan), ("inputs", replace(plan, compensate="none"))):
        found = scale_and_clip(stack, weight, stats, fold, how, effort, config, plain)
        gram = stats.gram / found.column_scale[:, None] / found.column_scale
        made = gptq_static(weight * found.column_scale, gram, found.scale, found.zero, 32, 4)
        assert made is not None
        delta = expand(made[0], found.scale) / found.column_scale - weight
        losses[name] = float(loss_rows(delta, stats.gram).sum())
    assert losses["costs"] < 0.95 * losses["inputs"]


def test_published_groups_take_their_scale_from_the_compensated_weights() -> None:
    weight, gram = problem(seed=1)
    found = gptq_published(weight, gram, 32, 4)
    assert found is not None
    codes, scale, zero, _ = found
    first = weight[:, :32]
    expected_scale, expected_zero = qparams(first.amin(-1), first.amax(-1), 4)
    assert torch.equal(scale[:, 0], expected_scale) and torch.equal(zero[:, 0], expected_zero)
    second = weight[:, 32:]
    assert not torch.equal(scale[:, 1], qparams(second.amin(-1), second.amax(-1), 4)[0])
    per_weight = [part.repeat_interleave(32, dim=1) for part in (scale, zero)]
    expected = textbook(weight, damped(gram, 0.01), *per_weight, size=1)
    assert (codes.double() != expected).float().mean() < 0.002


def test_compensation_lowers_the_loss_and_descent_lowers_it_further() -> None:
    weight, gram = problem(rows=64, seed=2)
    plain = quantize(weight, 4, 32)
    scale, zero = plain.scales.float(), plain.zeros.float()
    found = gptq_static(weight, gram, scale, zero, 32, 4)
    assert found is not None
    steady = damped(gram, 0.01)
    better = descend(weight, steady, found[0], scale, zero, 32, 4, sweeps=3)
    losses = [
        float(loss_rows(w - weight, steady).sum())
        for w in (plain.dequantize(), expand(found[0], scale), expand(better, scale))
    ]
    assert losses[0] > losses[1] > losses[2]


def test_descent_ends_where_no_single_move_helps() -> None:
    weight, gram = problem(rows=6, cols=32, seed=3)
    plain = quantize(weight, 3, 32)
    scale, zero = plain.scales.float(), plain.zeros.float()
    codes = descend(weight, gram, plain.codes.float() - zero, scale, zero, 32, 3, sweeps=50)
    best = loss_rows(expand(codes, scale) - weight, gram)
    for column in range(32):
        for move in (-1, 1):
            trial = codes.clone()
            trial[:, column] = torch.minimum(
                torch.maximum(trial[:, column] + move, -zero[:, 0]), 7 - zero[:, 0]
            )
            assert bool((loss_rows(expand(trial, scale) - weight, gram) >= best * (1 - 1e-4)).all())


def test_refitted_scales_are_the_least_squares_solution_up_to_fp16() -> None:
    weight, gram = problem(rows=16, seed=4)
    plain = quantize(weight, 3, 32)
    codes = plain.codes.float() - plain.zeros.float().repeat_interleave(32, dim=1)
    new = refit_scales(weight, gram, codes, plain.scales.float(), ridge=0.0)
    root = torch.linalg.cholesky(gram.double()).t()  # gram = root^T root
    for row in range(16):
        columns = torch.stack(
            [root[:, :32] @ codes[row, :32].double(), root[:, 32:] @ codes[row, 32:].double()], 1
        )
        expected = torch.linalg.lstsq(columns, root @ weight[row].double()).solution
        torch.testing.assert_close(new[row].double(), expected, rtol=2e-3, atol=0)  # fp16 rounding


def test_the_sweeps_refuse_operands_that_do_not_fit() -> None:
    weight, square = torch.zeros(32, 4), torch.eye(32)
    with pytest.raises(ValueError, match=r"expected \(K, N\) = \(32, 4\)"):
        gptq_sweep(weight, square, torch.ones(32, 3), torch.zeros(32, 4), 15)
    with pytest.raises(ValueError, match="float32"):
        descent_sweep(weight, weight.double(), square, weight, weight, 15)
    with pytest.raises(ValueError, match="multiple of 16"):
        gptq_sweep(torch.zeros(20, 4), torch.eye(20), torch.ones(20, 4), torch.zeros(20, 4), 15)


def test_published_methods_fit_on_all_tokens_where_nothing_is_judged() -> None:
    """Every eighth sample is held out from steps that are judged; gptq-r judges none."""
    weight, _ = problem()
    generator = torch.Generator().manual_seed(5)
    samples = torch.randn(16, 512, 64, generator=generator) * torch.rand(16, 1, 64, generator=generator) * 3
    stats = observe([samples], "toy")
    assert not torch.equal(stats.fit, stats.gram)
    config = QuantConfig(preset="gptq-r", group_size=32)
    recipe = config.recipe
    stack = Stack(weight, ("o",), (24,))
    found, _ = solve(stack, stats, no_fold(), recipe.steps, recipe.effort_on("cpu"), config)
    _, scale, zero = round_to_nearest(weight, config)
    expected = gptq_static(weight, stats.gram, scale, zero, 32, 4)
    assert expected is not None and torch.equal(found.codes, expected[0])
    other = gptq_static(weight, stats.fit, scale, zero, 32, 4)
    assert other is not None and not torch.equal(found.codes, other[0])
