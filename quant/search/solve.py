"""One stack of linears that share an input, from statistics to codes: scales and ranges, compensation, descent, refit.

N out features of the whole stack, K in features, g group size, G = K / g groups.
"""

from dataclasses import replace

import torch
from torch import Tensor

from quant.block_task import LinearReport, dead_channels
from quant.config import QuantConfig
from quant.search.rounding.compensation import DAMPING, gptq_published, gptq_static
from quant.search.rounding.descent import descend, expand, refit_scales
from quant.search.rounding.targets import CrossSums, move_targets
from quant.search.scale_and_clip import scale_and_clip
from quant.search.scales.folding import Fold
from quant.search.stack import Judge, QuantizedStack, Stack, round_to_nearest
from quant.settings import Effort, SolverSteps
from quant.stage_clock import stage
from quant.statistics.gram import InputStatistics, damped, fast_products, loss_rows

_TINY = 1e-30


@fast_products()
@stage("solve, apart from its steps")
def solve(
    stack: Stack,
    stats: InputStatistics,
    fold: Fold,
    plan: SolverSteps,
    effort: Effort,
    config: QuantConfig,
    cross: CrossSums | None = None,
) -> tuple[QuantizedStack, list[LinearReport]]:
    """Quantize a stack by the steps of `plan`.

    cross: of the float stream's outputs; moves the target when the plan asks.
    Returns the solution and a report for each linear; no linear ends above round to nearest in tr(dW G dW^T), unless
    the plan is a published method, which is left as it is and whose report says so.
    """
    weight = stack.weight
    plain = round_to_nearest(weight, config)
    loss_plain = stack.per_linear(loss_rows(expand(plain[0], plain[1]) - weight, stats.gram))
    shares = [0.0 for _ in stack.roles]
    if plan.compensate == "published":
        solution, before = _published(weight, stats, fold, plain, config), loss_plain
        after = stack.per_linear(loss_rows(solution.weight() - weight, stats.gram))
    else:
        limit = loss_plain * (1 + 1e-6) + _TINY
        for most in (plan.toward_float, plan.toward_float / 4, 0.0) if cross is not None else (0.0,):
            target, shares = (
                weight,
                [0.0 for _ in stack.roles],
            )  # one that leads above plain rounding is moved back
            if cross is not None and most:
                target, shares = move_targets(weight, stats, cross, stack.rows, most, plan.ridges)
            solution = scale_and_clip(stack, target, stats, fold, plan, effort, config, plain)
            before = stack.per_linear(loss_rows(solution.weight() - weight, stats.gram))
            _refine(solution, target, stats, plan, effort, config)
            after = stack.per_linear(loss_rows(solution.weight() - weight, stats.gram))
            if bool((after <= limit).all()):
                break
        if plan.scale and bool((after > limit).any()):
            solution, after = _fall_back(stack, stats, fold, plan, effort, config, solution)
    reports = _reports(stack, stats, solution, loss_plain.tolist(), before.tolist(), after.tolist())
    if cross is not None:
        reports = [
            replace(report, values={**report.values, "toward_float": share})
            for report, share in zip(reports, shares, strict=True)
        ]
    return solution, reports


def _published(
    weight: Tensor,
    stats: InputStatistics,
    fold: Fold,
    plain: tuple[Tensor, Tensor, Tensor],
    config: QuantConfig,
) -> QuantizedStack:
    channels, columns = torch.ones_like(fold.shrink(stats.mean_abs)), torch.ones_like(stats.mean_abs)
    found = gptq_published(weight, stats.gram, config.group_size, config.bits, symmetric=config.symmetric)
    if found is None:
        solution = QuantizedStack(channels, columns, *plain)
        solution.warnings.append(
            "the Gram matrix is not positive definite at any damping: rounded to nearest"
        )
        return solution
    codes, scale, zero, damping = found
    return QuantizedStack(channels, columns, codes, scale, zero, ["gptq"], values={"damping": damping})


def _refine(
    solution: QuantizedStack,
    target: Tensor,
    stats: InputStatistics,
    plan: SolverSteps,
    effort: Effort,
    config: QuantConfig,
) -> None:
    """Compensation, descent and refit in the scaled space, each kept row by row where it helps."""
    judge = Judge(target, stats)
    size, bits = config.group_size, config.bits
    scaled = target * solution.column_scale
    seen = stats.fit if plan.scale else stats.gram  # as published: nothing is judged, so nothing is held out
    gram = seen / solution.column_scale[:, None] / solution.column_scale
    if plan.compensate == "static":
        found = gptq_static(scaled, gram, solution.scale, solution.zero, size, bits)
        if found is None:
            solution.warnings.append(
                "the Gram matrix is not positive definite at any damping: no compensation"
            )
        else:
            solution.values["damping"] = found[1]
            if plan.scale:
                judge.keep(solution, "gptq", found[0], solution.scale, solution.zero)
            else:  # as published: nothing is judged
                solution.codes = found[0]
                solution.steps.append("gptq-r")
    steady = damped(gram, DAMPING)
    for _ in range(min(plan.rounds, effort.rounds)):
        codes = descend(
            scaled, steady, solution.codes, solution.scale, solution.zero, size, bits, effort.sweeps
        )
        judge.keep(solution, "descent", codes, solution.scale, solution.zero)
        scale = refit_scales(scaled, steady, solution.codes, solution.scale)
        judge.keep(solution, "refit", solution.codes, scale, solution.zero)
    if plan.refit:
        scale = refit_scales(scaled, steady, solution.codes, solution.scale)
        judge.keep(solution, "refit", solution.codes, scale, solution.zero)


def _fall_back(
    stack: Stack,
    stats: InputStatistics,
    fold: Fold,
    plan: SolverSteps,
    effort: Effort,
    config: QuantConfig,
    tried: QuantizedStack,
) -> tuple[QuantizedStack, Tensor]:
    """Start again from plain rounding with channel scale 1, where no step can end above it."""
    weight = stack.weight
    channel_scale = fold.snap(torch.ones_like(tried.channel_scale))
    column_scale = fold.spread(channel_scale)
    solution = QuantizedStack(channel_scale, column_scale, *round_to_nearest(weight * column_scale, config))
    solution.warnings = [*tried.warnings, "above round to nearest with channel scales: scale 1 is kept"]
    _refine(solution, weight, stats, plan, effort, config)
    return solution, stack.per_linear(loss_rows(solution.weight() - weight, stats.gram))


def _reports(
    stack: Stack,
    stats: InputStatistics,
    solution: QuantizedStack,
    plain: list[float],
    before: list[float],
    after: list[float],
) -> list[LinearReport]:
    warnings = list(solution.warnings)
    if stats.excluded:
        warnings.append(f"{stats.excluded} tokens with a NaN or an infinity were left out")
    if stats.dead:
        warnings.append(dead_channels(stats.dead))
    reports, start = [], 0
    for k, (role, rows) in enumerate(zip(stack.roles, stack.rows, strict=True)):
        own = list(warnings)
        if after[k] > plain[k] * (1 + 1e-6) + _TINY:
            own.append("loss above round to nearest")
        reports.append(
            LinearReport(
                role=role,
                shape=(rows, stack.weight.shape[1]),
                loss_rtn=plain[k],
                loss_before=before[k],
                loss_after=after[k],
                steps=tuple(solution.steps),
                warnings=tuple(own),
                values=dict(solution.values),
            )
        )
        start += rows
    return reports
