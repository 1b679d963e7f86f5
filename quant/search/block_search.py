"""The state of one block on its way through the search, and the moves that every order of visiting its linears is made of.

N out features, K in features.
"""

from dataclasses import replace

import torch
from torch import Tensor

from convert.checkpoint import LinearWeights
from convert.config import ModelConfig
from quant.config import QuantConfig
from quant.records import BlockTask, LinearReport
from quant.search.rounding.solution import Solution, Stack, free_codes
from quant.search.rounding.targets import CrossSums
from quant.search.scales.folding import Fold, fold_rows
from quant.search.solve import solve
from quant.selection import config_of_stack, is_quantized
from quant.settings import SolverSteps
from quant.stage_clock import stage
from quant.statistics.gram import InputStats, observe
from quant.statistics.parts import Parts


class BlockSearch:
    """The state of one block on its way through the search: what is quantized so far, and the reports."""

    def __init__(self, task: BlockTask) -> None:
        weights, device = task.weights, task.device
        with stage("move weights to the device"):
            to = {role: _move(part, device) for role, part in weights.linears.items()}
        norms = {role: norm.to(device).float() for role, norm in weights.norms.items()}
        self.weights = replace(weights, linears=to, norms=norms)
        self.source = self.weights
        self.config: ModelConfig = task.config
        self.quant: QuantConfig = task.quant
        self.device, self.dtype = device, task.dtype
        self.learning = task.quant.recipe.learning
        self.effort = task.quant.recipe.effort_on(device.type)
        self.reports: list[LinearReport] = []
        self.latents: dict[str, Tensor] = {}  # by role: centred codes as they would be if they were free

    def weight(self, role: str) -> Tensor:
        """The float weight (N, K) of the source, float32."""
        weight = self.source.linears[role].weight
        assert isinstance(weight, Tensor)
        return weight.float()

    def stack(self, roles: tuple[str, ...]) -> Stack:
        parts = [self.weight(role) for role in roles]
        return Stack(torch.cat(parts), roles, tuple(len(part) for part in parts))

    def quantize(
        self, roles: tuple[str, ...], stats: InputStats, fold: Fold, cross: CrossSums | None = None
    ) -> Solution:
        """Quantize linears that read one input, put them in place; the fold is the caller's."""
        stack = self.stack(roles)
        solution, reports = solve(stack, stats, fold, self.steps(roles), self.effort, self.quant, cross)
        self.reports += reports
        with stage("free codes"):
            latent = None if self.learning is None else free_codes(solution, stack.weight, stats)
        start = 0
        for role, rows in zip(roles, stack.rows, strict=True):
            if latent is not None:
                self.latents[role] = latent[start : start + rows]
            quantized = solution.quantized(slice(start, start + rows), self.quant.group_size, self.quant.bits)
            self.put(role, replace(self.weights.linears[role], weight=quantized))
            start += rows
        return solution

    def observe(self, parts: Parts, inputs: Tensor, what: str) -> InputStats:
        """Statistics of a linear's inputs (S, L, K)."""
        with stage("Gram matrices"):
            return observe((inputs[part] for part in parts.slices()), self.name(what))

    def put(self, role: str, part: LinearWeights) -> None:
        self.weights = replace(self.weights, linears={**self.weights.linears, role: part})

    def put_norm(self, role: str, norm: Tensor) -> None:
        self.weights = replace(self.weights, norms={**self.weights.norms, role: norm})

    def fold_back(self, role: str, solution: Solution) -> None:
        """The channel scales of a linear into the rows of the linear before it."""
        self.put(role, fold_rows(self.weights.linears[role], solution.channel_scale))

    def name(self, what: str) -> str:
        return f"Block {self.weights.index}, {what}"

    def fits(self, role: str) -> bool:
        """Whether this linear becomes integers."""
        return is_quantized(self.config, self.quant, self.source.index, role)

    def steps(self, roles: tuple[str, ...]) -> SolverSteps:
        """The steps of the linears that are solved together."""
        found = config_of_stack(self.quant, self.config, self.source.index, roles).recipe.steps
        return SolverSteps() if found is None else found


def _move(part: LinearWeights, device: torch.device) -> LinearWeights:
    weight = part.weight.to(device)
    return LinearWeights(weight, None if part.bias is None else part.bias.to(device))
