"""The state of one block on its way through the search, and the moves that every order of visiting its linears is made of.

N out features, K in features.
"""

from dataclasses import replace

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import ModelConfig
from quant.block_states import FloatBlock
from quant.block_task import BlockTask, LinearReport
from quant.config import QuantConfig
from quant.search.rounding.targets import CrossSums
from quant.search.scales.folding import Fold, fold_rows
from quant.search.solve import solve
from quant.search.stack import QuantizedStack, Stack, free_codes
from quant.selection import config_of_stack, is_quantized
from quant.settings import SolverSteps
from quant.stage_clock import stage
from quant.statistics.gram import InputStatistics


class BlockSearch:
    """The state of one block on its way through the search: what is quantized so far, and the reports."""

    def __init__(self, task: BlockTask) -> None:
        device = task.device
        with stage("move weights to the device"):
            block = _on_device(task.weights, device)
        norms = {role: norm.float() for role, norm in block.norms.items()}
        self.source: FloatBlock = replace(block, norms=norms)
        self.weights = BlockWeights(block.index, block.linears, norms, block.vectors, block.norm_offset)
        self.model: ModelConfig = task.config  # of the whole model; `config` is that of this layer
        self.config: ModelConfig = task.config.of_layer(block.index)
        self.quant: QuantConfig = task.quant
        self.device, self.dtype = device, task.dtype
        self.learning = task.quant.recipe.learning
        self.effort = task.quant.recipe.effort_on(device.type)
        self.reports: list[LinearReport] = []
        self.free_codes: dict[str, Tensor] = {}  # by role: centred codes as they would be if they were free

    def weight(self, role: str) -> Tensor:
        """The float weight (N, K) of the source, float32."""
        return self.source.linears[role].weight.to(self.device).float()

    def stack(self, roles: tuple[str, ...]) -> Stack:
        parts = [self.weight(role) for role in roles]
        return Stack(torch.cat(parts), roles, tuple(len(part) for part in parts))

    def quantize(
        self, roles: tuple[str, ...], stats: InputStatistics, fold: Fold, cross: CrossSums | None = None
    ) -> QuantizedStack:
        """Quantize linears that read one input, put them in place; the fold is the caller's."""
        stack = self.stack(roles)
        solution, reports = solve(stack, stats, fold, self.steps(roles), self.effort, self.quant, cross)
        self.reports += reports
        with stage("free codes"):
            free = None if self.learning is None else free_codes(solution, stack.weight, stats)
        start = 0
        for role, rows in zip(roles, stack.rows, strict=True):
            if free is not None:
                self.free_codes[role] = free[start : start + rows]
            quantized = solution.quantized(slice(start, start + rows), self.quant.group_size, self.quant.bits)
            home = self.source.linears[role].weight.device  # where the linear waits for its turn
            self.put(role, replace(self.weights.linears[role], weight=quantized.to(home)))
            start += rows
        return solution

    def put(self, role: str, part: LinearWeights) -> None:
        self.weights = replace(self.weights, linears={**self.weights.linears, role: part})

    def put_norm(self, role: str, norm: Tensor) -> None:
        self.weights = replace(self.weights, norms={**self.weights.norms, role: norm})

    def fold_back(self, role: str, solution: QuantizedStack) -> None:
        """The channel scales of a linear into the rows of the linear before it."""
        home = self.source.linears[role].weight.device
        self.put(role, fold_rows(self.weights.linears[role], solution.channel_scale.to(home)))

    def name(self, what: str) -> str:
        return f"Block {self.weights.index}, {what}"

    def fits(self, role: str) -> bool:
        """Whether this linear becomes integers."""
        return is_quantized(self.model, self.quant, self.source.index, role)

    def steps(self, roles: tuple[str, ...]) -> SolverSteps:
        """The steps of the linears that are solved together."""
        found = config_of_stack(self.quant, self.model, self.source.index, roles).recipe.steps
        return SolverSteps() if found is None else found


def _on_device(block: FloatBlock, device: torch.device) -> FloatBlock:
    """The block on the device, but for the experts of a mixture: one of them at a time is there when it is searched."""
    waiting = {role: part for role, part in block.linears.items() if role.startswith("experts.")}
    moved = replace(
        block, linears={role: part for role, part in block.linears.items() if role not in waiting}
    ).to(device)
    return replace(moved, linears={role: waiting.get(role) or moved.linears[role] for role in block.linears})
