"""Channel scales and clip ranges of a stack, chosen together by the Gram form of the loss, as compensation will leave it.

N out features of the whole stack, K in features, K' channels of the operation before it, G groups.
"""

from dataclasses import replace

import torch
from torch import Tensor

from quant.config import QuantConfig
from quant.search.rounding.compensation import compensated_costs
from quant.search.scales.awq import candidates, exponents, score_candidates
from quant.search.scales.clip import banded_pairs, search_clip, shrink_pairs
from quant.search.scales.folding import Fold
from quant.search.stack import Judge, QuantizedStack, Stack, round_to, round_to_nearest
from quant.settings import Effort, SolverSteps
from quant.stage_clock import stage
from quant.statistics.gram import InputStatistics, fast_products


def scale_and_clip(
    stack: Stack,
    target: Tensor,
    stats: InputStatistics,
    fold: Fold,
    plan: SolverSteps,
    effort: Effort,
    config: QuantConfig,
    plain: tuple[Tensor, Tensor, Tensor],
) -> QuantizedStack:
    """Channel scales and clip ranges, or neither."""
    ones = torch.ones_like(fold.shrink(stats.mean_abs))
    if not plan.scale:
        return QuantizedStack(ones, fold.spread(ones), *plain)
    stats = judged_by(stats, plan)
    scale, found = choose_scale(Stack(target, stack.roles, stack.rows), stats, fold, effort, config)
    solution = _clipped(target, stats, fold, scale, effort, config)
    if not found:
        solution.warnings.append("no candidate scale has a finite loss: scale 1 is kept")
    if "alpha" in found:
        solution.steps.insert(0, "scale")
    solution.values.update(found)
    return solution


@stage("costs that compensation leaves")
def judged_by(stats: InputStatistics, plan: SolverSteps) -> InputStatistics:
    """The statistics that scales and ranges are chosen by: where compensation follows, what it will leave of each column."""
    costs = compensated_costs(stats.gram) if plan.compensate == "static" else None
    return stats if costs is None else replace(stats, gram=costs, fit=costs, hold=costs)


def shrink_factors(effort: Effort, steps: int, bits: int, device: torch.device) -> Tensor:
    """Shrink factors (P, 2) of candidate ranges; fewer bits shrink further."""
    lowest = {4: 0.55, 3: 0.45, 2: 0.35}[bits]
    return (banded_pairs if effort.banded else shrink_pairs)(steps, lowest, device)


@fast_products()
@stage("channel scales")
def choose_scale(
    stack: Stack, stats: InputStatistics, fold: Fold, effort: Effort, config: QuantConfig
) -> tuple[Tensor, dict[str, float]]:
    """The channel scale (K',) whose clipped rounding loses least, no linear of the stack losing more than with scale 1.

    Returns it with what to report: nothing when no candidate has a finite loss.
    """
    weight = stack.weight
    grid = exponents(effort.alpha_steps)
    scales = candidates(weight, stats.mean_abs, config.group_size, fold, grid)
    sample, sampled_rows = _sample_rows(stack, effort.score_rows)
    pairs = shrink_factors(effort, effort.score_steps, config.bits, weight.device)
    losses = score_candidates(
        weight[sample],
        fold.spread(scales),
        stats.gram,
        pairs,
        config.group_size,
        config.bits,
        sampled_rows,
        config.symmetric,
    )
    total = losses.sum(1).nan_to_num(nan=torch.inf)
    if not bool(total.isfinite().any()):
        return scales[0], {}
    allowed = (losses <= losses[0] * (1 + 1e-6)).all(1)
    allowed[0] = True
    chosen = int(torch.where(allowed, total, torch.full_like(total, torch.inf)).argmin())
    values = {"scale_loss": float(total[chosen]), "scale_loss_of_ones": float(total[0])}
    if chosen:
        values |= {"alpha": grid[chosen - 1][0], "weight_term": float(grid[chosen - 1][1])}
    return scales[chosen], values


def _sample_rows(stack: Stack, limit: int) -> tuple[Tensor, list[int]]:
    """Evenly spaced rows of each linear, about `limit` in all, and how many of each."""
    step = max(1, -(-len(stack.weight) // limit))
    parts, start = [], 0
    for rows in stack.rows:
        parts.append(torch.arange(start, start + rows, min(step, rows), device=stack.weight.device))
        start += rows
    return torch.cat(parts), [len(part) for part in parts]


@stage("clip ranges")
def _clipped(
    target: Tensor,
    stats: InputStatistics,
    fold: Fold,
    channel_scale: Tensor,
    effort: Effort,
    config: QuantConfig,
) -> QuantizedStack:
    """The stack under one channel scale: full ranges, then each row's clipped ranges where they help."""
    column_scale = fold.spread(channel_scale)
    scaled = target * column_scale
    solution = QuantizedStack(channel_scale, column_scale, *round_to_nearest(scaled, config))
    pairs = shrink_factors(effort, effort.clip_steps, config.bits, target.device)
    scale, zero = search_clip(
        target, column_scale[None], stats.fit, pairs, config.group_size, config.bits, config.symmetric
    )
    codes = round_to(scaled, scale[0], zero[0], config)
    solution.values["clipped"] = Judge(target, stats).keep(solution, "clip", codes, scale[0], zero[0])
    return solution
