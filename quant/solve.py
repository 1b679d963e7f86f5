"""One stack of linears that share an input, from statistics to codes: scales and ranges, compensation, descent, refit.

N out features of the whole stack, K in features, g group size, G = K / g groups. Rows never interact, so that every step is
kept or dropped row by row, where the loss that is measured falls on all tokens and on those held out from the fit.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.int4 import Quantized, qparams, quantize_codes
from quant.awq import candidates, exponents, score_candidates
from quant.clip import group_ranges, search_clip
from quant.config import QuantConfig
from quant.descent import descend, expand, refit_scales
from quant.folding import Fold
from quant.gptq import DAMPING, gptq_published, gptq_static
from quant.gram import InputStats, damped, loss_rows
from quant.presets import Effort, Plan
from quant.records import LinearReport, dead_channels
from quant.targets import CrossSums, move_targets

_TINY = 1e-30


@dataclass
class Solution:
    """A quantized stack. In the space of weight * column_scale: centred codes (N, K), scale and zero (N, G), float32."""

    channel_scale: Tensor  # (K',) what folds into the previous operation
    column_scale: Tensor  # (K,)
    codes: Tensor
    scale: Tensor
    zero: Tensor
    steps: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)

    def quantized(self, rows: slice, group_size: int, bits: int) -> Quantized:
        """The rows as packed types: codes q = r + z."""
        zero = self.zero[rows]
        codes = self.codes[rows] + zero.repeat_interleave(group_size, dim=1)
        return Quantized(
            codes.to(torch.uint8), self.scale[rows].half(), zero.to(torch.uint8), group_size, bits
        )

    def weight(self) -> Tensor:
        """What the stack computes with, in the space of the original input: (N, K) float32."""
        return expand(self.codes, self.scale) / self.column_scale


@dataclass(frozen=True)
class Stack:
    """Linears that read the same input: weight (N, K) float32 and the rows of each, by role."""

    weight: Tensor
    roles: tuple[str, ...]
    rows: tuple[int, ...]

    def per_linear(self, losses: Tensor) -> Tensor:
        """Losses of rows (N,) -> of linears."""
        return torch.stack([part.sum() for part in losses.split(list(self.rows))])


def round_to_nearest(weight: Tensor, config: QuantConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Centred codes, scale and zero of plain rounding."""
    scale, zero = qparams(*group_ranges(weight, config.group_size), config.bits)
    return _round_to(weight, scale, zero, config), scale, zero


def _round_to(weight: Tensor, scale: Tensor, zero: Tensor, config: QuantConfig) -> Tensor:
    codes = quantize_codes(weight, scale, zero, config.group_size, config.bits)
    return codes - zero.repeat_interleave(config.group_size, dim=1)


def free_codes(solution: Solution, weight: Tensor, stats: InputStats) -> Tensor:
    """Where each centred code would go if it alone were free and real: r - (D G)_j / (G_jj s_j), D = w^ - w: (N, K)."""
    gram = damped(stats.gram / solution.column_scale[:, None] / solution.column_scale, DAMPING)
    delta = expand(solution.codes, solution.scale) - weight * solution.column_scale
    moves = (delta @ gram) / gram.diagonal()
    free: Tensor = solution.codes - (
        moves.view(*solution.scale.shape, -1) / solution.scale[..., None]
    ).flatten(1)
    return free


class _Judge:
    """Losses of the rows of candidates against a target, in the space of the original input; keeps what improves."""

    def __init__(self, target: Tensor, stats: InputStats) -> None:
        self.target, self.stats = target, stats
        self._current: tuple[Tensor, Tensor] | None = None  # losses of the solution as it is

    def losses(self, solution: Solution, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) on all tokens and (N,) on those held out."""
        delta = expand(codes, scale) / solution.column_scale - self.target
        on_all = loss_rows(delta, self.stats.gram)
        return on_all, on_all if self.stats.hold is self.stats.gram else loss_rows(delta, self.stats.hold)

    def keep(self, solution: Solution, step: str, codes: Tensor, scale: Tensor, zero: Tensor) -> float:
        """Take the rows that improve into the solution; returns their share."""
        old = self._current or self.losses(solution, solution.codes, solution.scale)
        new = self.losses(solution, codes, scale)
        better = (new[0] < old[0]) & (new[1] <= old[1])
        self._current = torch.where(better, new[0], old[0]), torch.where(better, new[1], old[1])
        share = float(better.float().mean())
        if share > 0:
            solution.codes = torch.where(better[:, None], codes, solution.codes)
            solution.scale = torch.where(better[:, None], scale, solution.scale)
            solution.zero = torch.where(better[:, None], zero, solution.zero)
            if step not in solution.steps:
                solution.steps.append(step)
        return share


def solve(
    stack: Stack,
    stats: InputStats,
    fold: Fold,
    plan: Plan,
    effort: Effort,
    config: QuantConfig,
    cross: CrossSums | None = None,
) -> tuple[Solution, list[LinearReport]]:
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
                target, shares = move_targets(weight, stats, cross, stack.rows, most)
            solution = _scaled(stack, target, stats, fold, plan, effort, config, plain)
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
    weight: Tensor, stats: InputStats, fold: Fold, plain: tuple[Tensor, Tensor, Tensor], config: QuantConfig
) -> Solution:
    channels, columns = torch.ones_like(fold.shrink(stats.mean_abs)), torch.ones_like(stats.mean_abs)
    found = gptq_published(weight, stats.gram, config.group_size, config.bits)
    if found is None:
        solution = Solution(channels, columns, *plain)
        solution.warnings.append(
            "the Gram matrix is not positive definite at any damping: rounded to nearest"
        )
        return solution
    codes, scale, zero, damping = found
    return Solution(channels, columns, codes, scale, zero, ["gptq"], values={"damping": damping})


def _scaled(
    stack: Stack,
    target: Tensor,
    stats: InputStats,
    fold: Fold,
    plan: Plan,
    effort: Effort,
    config: QuantConfig,
    plain: tuple[Tensor, Tensor, Tensor],
) -> Solution:
    """Channel scales and clip ranges, or neither."""
    ones = torch.ones_like(fold.shrink(stats.mean_abs))
    if not plan.scale:
        return Solution(ones, fold.spread(ones), *plain)
    scale, found = choose_scale(Stack(target, stack.roles, stack.rows), stats, fold, effort, config)
    solution = _clipped(target, stats, fold, scale, effort, config)
    if not found:
        solution.warnings.append("no candidate scale has a finite loss: scale 1 is kept")
    if "alpha" in found:
        solution.steps.insert(0, "scale")
    solution.values.update(found)
    return solution


def choose_scale(
    stack: Stack, stats: InputStats, fold: Fold, effort: Effort, config: QuantConfig
) -> tuple[Tensor, dict[str, float]]:
    """The channel scale (K',) whose clipped rounding loses least, no linear of the stack losing more than with scale 1.

    Returns it with what to report: nothing when no candidate has a finite loss.
    """
    weight = stack.weight
    grid = exponents(effort.alpha_steps)
    scales = candidates(weight, stats.mean_abs, config.group_size, fold, grid)
    sample, sampled_rows = _sample_rows(stack, effort.score_rows)
    pairs = effort.pairs(effort.score_steps, config.bits, weight.device)
    losses = score_candidates(
        weight[sample], fold.spread(scales), stats.gram, pairs, config.group_size, config.bits, sampled_rows
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


def _clipped(
    target: Tensor, stats: InputStats, fold: Fold, channel_scale: Tensor, effort: Effort, config: QuantConfig
) -> Solution:
    """The stack under one channel scale: full ranges, then each row's clipped ranges where they help."""
    column_scale = fold.spread(channel_scale)
    scaled = target * column_scale
    solution = Solution(channel_scale, column_scale, *round_to_nearest(scaled, config))
    pairs = effort.pairs(effort.clip_steps, config.bits, target.device)
    scale, zero = search_clip(target, column_scale[None], stats.fit, pairs, config.group_size, config.bits)
    codes = _round_to(scaled, scale[0], zero[0], config)
    solution.values["clipped"] = _Judge(target, stats).keep(solution, "clip", codes, scale[0], zero[0])
    return solution


def _refine(
    solution: Solution, target: Tensor, stats: InputStats, plan: Plan, effort: Effort, config: QuantConfig
) -> None:
    """Compensation, descent and refit in the scaled space, each kept row by row where it helps."""
    judge = _Judge(target, stats)
    size, bits = config.group_size, config.bits
    scaled = target * solution.column_scale
    gram = stats.fit / solution.column_scale[:, None] / solution.column_scale
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
    stats: InputStats,
    fold: Fold,
    plan: Plan,
    effort: Effort,
    config: QuantConfig,
    tried: Solution,
) -> tuple[Solution, Tensor]:
    """Start again from plain rounding with channel scale 1, where no step can end above it."""
    weight = stack.weight
    channel_scale = fold.snap(torch.ones_like(tried.channel_scale))
    column_scale = fold.spread(channel_scale)
    solution = Solution(channel_scale, column_scale, *round_to_nearest(weight * column_scale, config))
    solution.warnings = [*tried.warnings, "above round to nearest with channel scales: scale 1 is kept"]
    _refine(solution, weight, stats, plan, effort, config)
    return solution, stack.per_linear(loss_rows(solution.weight() - weight, stats.gram))


def _reports(
    stack: Stack,
    stats: InputStats,
    solution: Solution,
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
