"""Learned rounding: codes, scales and norms of one block trained together on what the block gives, straight through the grid.

S samples, L tokens a sample, H hidden size, R groups of the block, g group size. Starts from a quantized block; keeps the
best that was seen on all the text, the start included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights
from convert.config import ModelConfig
from engine.model.attention import causal_attend
from quant.config import QuantConfig
from quant.learn.captured_steps import Steps
from quant.learn.training import (
    Adam,
    FlatLinears,
    RoundToGrid,
    batches,
    fp16_norm,
    fp16_scale,
    repeatable,
    rise,
    training_attend,
)
from quant.records import LinearReport
from quant.settings import LearnedRounding
from quant.stage_clock import stage
from quant.statistics.chunks import chunks
from quant.statistics.gram import fast_products
from quant.statistics.parts import Parts

NORMS = ("attn_norm", "mlp_norm")


_STEADY_STEPS = 100  # fewer steps than these are not made longer


@stage("learned rounding")
def learn_block(
    block: BlockWeights,
    latents: Mapping[str, Tensor],
    config: ModelConfig,
    quant: QuantConfig,
    x: Tensor,
    y: Tensor,
    reports: list[LinearReport],
    learning: LearnedRounding,
    metric: Tensor | None = None,
) -> tuple[BlockWeights, list[LinearReport]]:
    """Train a quantized block so that it maps x to y.

    Args:
        block: Quantized linears, fp16 norms. latents: by role (N, K) float32, where each centred code would go if it
            were free; kept within half a step of its integer, so that nothing changes at first.
        metric: (H, H), what an error is multiplied by before it is squared; None: nothing.
        x: (S, L, H) inputs, those of the quantized model; y: (S, L, H) what is wanted after this block.
        learning: how the training goes.

    Returns the block and the reports with the step and both losses added: mean squared error per element of y, before and after.
    """
    device, steps = x.device, learning.steps
    flat = FlatLinears.of([block], device)
    start = flat.codes.float()
    wanted = torch.cat([latents[role].view(-1, flat.group_size) for _, role in flat.names])
    latent = torch.maximum(torch.minimum(wanted, start + 0.49), start - 0.49)
    scale_move = torch.zeros_like(flat.scales)
    norms = {role: block.norms[role].to(device).float() for role in NORMS}
    norm_moves = {role: torch.zeros_like(norm) for role, norm in norms.items()}
    max_code = quant.max_code
    parts = Parts(config, x)
    size = min(max(1, learning.batch_tokens // x.shape[1]), len(x))
    metric = None if metric is None else metric.to(device)

    def current() -> BlockWeights:
        scales = fp16_scale(flat.scales * (1 + scale_move))
        dense = RoundToGrid.apply(latent, scales, flat.zeros, max_code)
        moved = {role: fp16_norm(norm * (1 + norm_moves[role])) for role, norm in norms.items()}
        return flat.dense(dense, [moved], device)[0]

    def error(part: Tensor | slice, inputs: Tensor, weights: BlockWeights) -> Tensor:
        """Mean squared error of these samples behind the block."""
        attend = training_attend(causal_attend(len(inputs), x.shape[1], config), device)
        delta = parts.block(inputs, weights, attend=attend) - y[part].float()
        return (delta if metric is None else delta @ metric).pow(2).mean()

    def whole() -> float:
        weights = current()
        pieces = ((part, x[part].float()) for part in chunks(len(x), x.shape[1], device))
        return float(sum(error(part, inputs, weights) * len(inputs) for part, inputs in pieces)) / len(x)

    params = [latent, scale_move, *norm_moves.values()]
    rates = [learning.code_rate, learning.scale_rate] + [learning.norm_rate] * len(norm_moves)
    trained = [p for p, rate in zip(params, rates, strict=True) if rate]
    rates = [rate / max(steps, _STEADY_STEPS) for rate in rates if rate]
    optimizer = Adam(trained, rates)
    order = batches(len(x), size, steps, quant.seed + 1).to(device)
    schedule = _schedule(steps, learning.warmup).to(device)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    means = [p.clone() for p in trained] if learning.average else []

    def step() -> None:
        chosen = order.index_select(0, counter)[0]
        with torch.enable_grad():
            for p in trained:
                p.requires_grad_(True)
            grads = torch.autograd.grad(error(chosen, x[chosen].float(), current()) * gain, trained)
            for p in trained:
                p.requires_grad_(False)
        with torch.no_grad():
            optimizer.step(grads, schedule.index_select(0, counter))
            for mean, p in zip(means, trained, strict=False):
                mean.lerp_(p, 1 - learning.average)
            counter.add_(1)

    def put(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        for p, value in zip(into, values, strict=True):
            p.copy_(value)

    with fast_products(), repeatable(), torch.no_grad():
        first = loss = whole()
        gain = 1 / max(first, 1e-30)  # relative to the start: keeps small gradients away from zero
        kept = [p.clone() for p in params]
        runner = Steps(step, device)
        for check in range(learning.checks):
            runner.run(steps * (check + 1) // learning.checks - steps * check // learning.checks)
            reached = [p.clone() for p in trained]
            put(means or reached, trained)
            now = whole()
            if now < loss:
                loss, kept = now, [p.clone() for p in params]
            put(reached, trained)
        put(kept, params)
        codes = torch.clamp(latent.round(), -flat.zeros, max_code - flat.zeros)
        moved = {role: fp16_norm(norm * (1 + norm_moves[role])) for role, norm in norms.items()}
        done = flat.packed(codes, fp16_scale(flat.scales * (1 + scale_move)), [moved])[0]
    values = {"block_before": first, "block_after": loss}
    names = {role for _, role in flat.names}
    return done, [
        replace(
            report,
            steps=(*report.steps, "rounding") if loss < first else report.steps,
            values={**report.values, **values},
        )
        if report.role in names
        else report
        for report in reports
    ]


def _schedule(steps: int, warmup: float) -> Tensor:
    """A linear decay from 1 to 0 behind a rise: (steps,).

    The first steps of Adam move every code by the whole rate, however small its gradient: without the rise the loss of 3-bit
    blocks goes up at first, and in some of them does not come back.
    """
    return (1 - torch.arange(steps) / steps) * rise(steps, warmup)
