"""A stack of linears that share an input, what is found for it so far, and the judge of each further step.

N out features of the whole stack, K in features, g group size, G = K / g groups. Rows never interact, so that every step is
kept or dropped row by row, where the loss that is measured falls on all tokens and on those held out from the fit.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.int4 import Quantized, qparams, quantize_codes
from quant.config import QuantConfig
from quant.search.rounding.compensation import DAMPING
from quant.search.rounding.descent import expand
from quant.search.scales.clip import group_ranges
from quant.stage_clock import stage
from quant.statistics.gram import InputStatistics, damped, fast_products, loss_rows


@dataclass
class QuantizedStack:
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
    scale, zero = qparams(*group_ranges(weight, config.group_size), config.bits, config.symmetric)
    return round_to(weight, scale, zero, config), scale, zero


def round_to(weight: Tensor, scale: Tensor, zero: Tensor, config: QuantConfig) -> Tensor:
    """Centred codes of the nearest values on this grid."""
    codes = quantize_codes(weight, scale, zero, config.group_size, config.bits)
    return codes - zero.repeat_interleave(config.group_size, dim=1)


@fast_products()
def free_codes(solution: QuantizedStack, weight: Tensor, stats: InputStatistics) -> Tensor:
    """Where each centred code would go if it alone were free and real: r - (D G)_j / (G_jj s_j), D = w^ - w: (N, K)."""
    gram = damped(stats.gram / solution.column_scale[:, None] / solution.column_scale, DAMPING)
    delta = expand(solution.codes, solution.scale) - weight * solution.column_scale
    moves = (delta @ gram) / gram.diagonal()
    free: Tensor = solution.codes - (
        moves.view(*solution.scale.shape, -1) / solution.scale[..., None]
    ).flatten(1)
    return free


class Judge:
    """Losses of the rows of candidates against a target, in the space of the original input; keeps what improves."""

    def __init__(self, target: Tensor, stats: InputStatistics) -> None:
        self.target, self.stats = target, stats
        self._current: tuple[Tensor, Tensor] | None = None  # losses of the solution as it is

    @stage("losses of steps")
    def losses(self, solution: QuantizedStack, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) on all tokens and (N,) on those held out."""
        delta = expand(codes, scale) / solution.column_scale - self.target
        on_all = loss_rows(delta, self.stats.gram)
        return on_all, on_all if self.stats.hold is self.stats.gram else loss_rows(delta, self.stats.hold)

    def keep(self, solution: QuantizedStack, step: str, codes: Tensor, scale: Tensor, zero: Tensor) -> float:
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
