"""Learned rounding: codes, scales and norms of one block trained together on what the block gives, straight through the grid.

S samples, L tokens a sample, H hidden size, R groups of the block, g group size. Starts from a quantized block; keeps the
best that was seen on all the text, the start included.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convert.config import ModelConfig
from engine.model.attention import causal_attend
from quant.block_states import FloatBlock, QuantizedBlock
from quant.block_task import BlockResult, BlockTask, LinearReport, Streams
from quant.learn.captured_steps import Steps
from quant.learn.predicted_error import predicted_output
from quant.learn.training import (
    Adam,
    FlatLinears,
    RoundToGrid,
    batches,
    fp16_scale,
    repeatable,
    rise,
    stored_norm,
    training_attend,
)
from quant.settings import LearnedRounding
from quant.stage_clock import stage
from quant.statistics.chunked_block import ChunkedBlock
from quant.statistics.chunks import chunk_samples, chunks
from quant.statistics.gram import fast_products

NORMS = ("attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm")  # those that the family has
_STEADY_STEPS = 100  # fewer steps than these are not made longer


def learn_rounding(
    task: BlockTask,
    result: BlockResult,
    learning: LearnedRounding,
    source: FloatBlock,
    free_codes: Mapping[str, Tensor],
) -> BlockResult:
    """The result of a search with its rounding trained, and the streams after it.

    source: the float block on the device of the streams. free_codes: by role (N, K) float32, where each centred code would go
    if it alone were free and real.
    """
    if not isinstance(task.inputs, Streams) or result.streams is None:
        raise TypeError("Learned rounding needs the streams before and after the block.")
    x, fp = task.inputs.quantized, result.streams.fp
    wanted = block_target(task, source, fp, learning.toward_float)
    with stage("learned rounding"):
        done, reports = learn_block(
            result.weights,
            free_codes,
            task.config,
            task.quant.max_code,
            task.quant.seed,
            x,
            wanted,
            result.reports,
            learning,
            task.metric,
        )
    with stage("quantized stream"):
        chunked = ChunkedBlock(task.config, x)
        dense = chunked.dense(done)
        out = chunked.map(lambda h: chunked.block(h, dense, task.tap), x)
    return BlockResult(done, reports, Streams(fp, out))


@stage("target of learned rounding")
def block_target(task: BlockTask, source: FloatBlock, fp: Tensor, toward_float: float) -> Tensor:
    """What the block should give (S, L, H): the float stream after it, or a share of the way there from what x predicts of it."""
    if toward_float == 1 or not isinstance(task.inputs, Streams):
        return fp
    x = task.inputs.quantized
    chunked = ChunkedBlock(task.config, x)
    dense = chunked.dense(source)
    given = chunked.map(lambda h: chunked.block(h, dense), x)
    predicted = predicted_output(given, x, fp, task.metric, chunk_samples(x.shape[1], x.device))
    return torch.lerp(predicted, fp, toward_float)


def learn_block(
    block: QuantizedBlock,
    free_codes: Mapping[str, Tensor],
    config: ModelConfig,
    max_code: int,
    seed: int,
    x: Tensor,
    y: Tensor,
    reports: Sequence[LinearReport],
    learning: LearnedRounding,
    metric: Tensor | None = None,
) -> tuple[QuantizedBlock, tuple[LinearReport, ...]]:
    """Train a quantized block so that it maps x to y.

    Args:
        block: Quantized linears, fp16 norms. free_codes: as of `learn_rounding`.
        x: (S, L, H) inputs, those of the quantized model; y: (S, L, H) what is wanted after this block.
        metric: (H, H), what an error is multiplied by before it is squared; None: nothing.

    Returns the block and the reports with the step and both losses added: mean squared error per element of y, before and after.
    """
    weights = _TrainedWeights(block, free_codes, max_code, x.device)
    text = _BlockText(config, x, y, None if metric is None else metric.to(x.device))
    with fast_products(), repeatable(), torch.no_grad():
        first, last = _train(weights, text, learning, seed)
        done = weights.packed()
    values = {"block_before": first, "block_after": last}
    return done, tuple(
        _with_rounding(report, values) if report.role in weights.roles else report for report in reports
    )


def _with_rounding(report: LinearReport, values: dict[str, float]) -> LinearReport:
    """The report with both losses and, where the loss fell, the step."""
    fell = values["block_after"] < values["block_before"]
    steps = (*report.steps, "rounding") if fell else report.steps
    return replace(report, steps=steps, values={**report.values, **values})


def _train(
    weights: "_TrainedWeights", text: "_BlockText", learning: LearnedRounding, seed: int
) -> tuple[float, float]:
    """All steps; the weights end as the best that was seen. Returns the loss at the start and at the end."""
    trained, rates = weights.trained(learning)
    means = [p.clone() for p in trained] if learning.average else []
    first = loss = text.loss(weights)
    best = weights.snapshot()
    step = _step(weights, text, trained, rates, means, learning, seed, gain=1 / max(first, 1e-30))
    runner = Steps(step, text.device)
    for check in range(learning.checks):
        runner.run(
            learning.steps * (check + 1) // learning.checks - learning.steps * check // learning.checks
        )
        reached = [p.clone() for p in trained]
        _copy(means or reached, trained)
        now = text.loss(weights)
        if now < loss:
            loss, best = now, weights.snapshot()
        _copy(reached, trained)
    _copy(best, weights.params)
    return first, loss


def _step(
    weights: "_TrainedWeights",
    text: "_BlockText",
    trained: list[Tensor],
    rates: list[float],
    means: list[Tensor],
    learning: LearnedRounding,
    seed: int,
    gain: float,
) -> Callable[[], None]:
    """One step of the training, to be called again and again; everything that changes is a tensor.

    gain: a factor on the loss, which makes it relative to the start and so keeps small gradients away from zero.
    """
    device = text.device
    optimizer = Adam(trained, [rate / max(learning.steps, _STEADY_STEPS) for rate in rates])
    size = min(max(1, learning.batch_tokens // text.length), text.samples)
    order = batches(text.samples, size, learning.steps, seed + 1).to(device)
    schedule = _schedule(learning.steps, learning.warmup).to(device)
    counter = torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> None:
        chosen = order.index_select(0, counter)[0]
        with torch.enable_grad():
            for p in trained:
                p.requires_grad_(True)
            grads = torch.autograd.grad(text.error(chosen, weights.dense()) * gain, trained)
            for p in trained:
                p.requires_grad_(False)
        with torch.no_grad():
            optimizer.step(grads, schedule.index_select(0, counter), means, learning.average)
            counter.add_(1)

    return step


def _copy(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for p, value in zip(into, values, strict=True):
        p.copy_(value)


class _TrainedWeights:
    """What is trained of a block: its codes as reals, how far its scales and norms have moved from where they were."""

    def __init__(
        self, block: QuantizedBlock, free_codes: Mapping[str, Tensor], max_code: int, device: torch.device
    ) -> None:
        self._flat = FlatLinears.of([block], device)
        self._device, self._max_code = device, max_code
        start = self._flat.codes.float()
        wanted = torch.cat([free_codes[role].view(-1, self._flat.group_size) for _, role in self._flat.names])
        # kept within half a step of the integers, so that nothing changes at first
        self._latent = torch.maximum(torch.minimum(wanted, start + 0.49), start - 0.49)
        self._scale_move = torch.zeros_like(self._flat.scales)
        self._norms = {role: block.norms[role].to(device).float() for role in NORMS if role in block.norms}
        self._norm_offset = block.norm_offset
        self._norm_moves = {role: torch.zeros_like(norm) for role, norm in self._norms.items()}

    @property
    def roles(self) -> set[str]:
        """The linears that are trained."""
        return {role for _, role in self._flat.names}

    @property
    def params(self) -> list[Tensor]:
        return [self._latent, self._scale_move, *self._norm_moves.values()]

    def trained(self, learning: LearnedRounding) -> tuple[list[Tensor], list[float]]:
        """The parameters that move, and their rates over all steps."""
        rates = [learning.code_rate, learning.scale_rate] + [learning.norm_rate] * len(self._norm_moves)
        pairs = [(p, rate) for p, rate in zip(self.params, rates, strict=True) if rate]
        return [p for p, _ in pairs], [rate for _, rate in pairs]

    def snapshot(self) -> list[Tensor]:
        return [p.clone() for p in self.params]

    def _moved_norms(self) -> dict[str, Tensor]:
        return {
            role: stored_norm(norm * (1 + self._norm_moves[role]), self._norm_offset)
            for role, norm in self._norms.items()
        }

    def _moved_scales(self) -> Tensor:
        return fp16_scale(self._flat.scales * (1 + self._scale_move))

    def dense(self) -> FloatBlock:
        """The block as it is now, float32, differentiable in what is trained."""
        scales = self._moved_scales()
        dense = RoundToGrid.apply(self._latent, scales, self._flat.zeros, self._max_code)
        return self._flat.dense(dense, [self._moved_norms()], self._device)[0]

    def packed(self) -> QuantizedBlock:
        """The block as it is now, in packed types."""
        zeros = self._flat.zeros
        codes = torch.clamp(self._latent.round(), -zeros, self._max_code - zeros)
        return self._flat.packed(codes, self._moved_scales(), [self._moved_norms()])[0]


class _BlockText:
    """The text that a block is trained on: x (S, L, H) before it, y (S, L, H) wanted after it."""

    def __init__(self, config: ModelConfig, x: Tensor, y: Tensor, metric: Tensor | None) -> None:
        self._chunked = ChunkedBlock(config, x)
        self._config, self._x, self._y, self._metric = config, x, y, metric
        self.device, self.samples, self.length = x.device, x.shape[0], x.shape[1]

    def error(self, samples: Tensor | slice, block: FloatBlock) -> Tensor:
        """Mean squared error of these samples after the block."""
        inputs = self._x[samples].float()
        attend = training_attend(causal_attend(len(inputs), self.length, self._config), self.device)
        delta = self._chunked.block(inputs, block, attend=attend) - self._y[samples].float()
        return (delta if self._metric is None else delta @ self._metric).pow(2).mean()

    def loss(self, weights: _TrainedWeights) -> float:
        """Mean squared error of all samples."""
        block = weights.dense()
        total = sum(
            self.error(part, block) * len(self._x[part])
            for part in chunks(self.samples, self.length, self.device)
        )
        return float(total) / self.samples


def _schedule(steps: int, warmup: float) -> Tensor:
    """A linear decay from 1 to 0 after a rise: (steps,).

    The first steps of Adam move every code by the whole rate, however small its gradient: without the rise the loss of 3-bit
    blocks goes up at first, and in some of them does not come back.
    """
    return (1 - torch.arange(steps) / steps) * rise(steps, warmup)
