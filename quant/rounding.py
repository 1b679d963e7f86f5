"""Learned rounding: codes, scales and norms of one block trained together on what the block gives, straight through the grid.

S samples, L tokens a sample, H hidden size, R groups of the block, g group size. Starts from a quantized block; keeps the
best that was seen on all the text, the start included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights
from convert.config import ModelConfig
from engine.attention import causal_attend
from quant.ahead import Ahead, EvenGradients
from quant.chunks import chunks
from quant.config import QuantConfig
from quant.gram import fast_products
from quant.parts import Parts, float_block
from quant.records import LinearReport
from quant.training import (
    Adam,
    FlatLinears,
    RoundToGrid,
    SignDescent,
    Steps,
    batches,
    fp16_norm,
    fp16_scale,
    repeatable,
    training_attend,
)

NORMS = ("attn_norm", "mlp_norm")


@dataclass(frozen=True)
class Learning:
    """How the training goes; rates are totals over all steps of a linear decay, codes in steps of the grid, others relative."""

    optimizer: Literal["sign", "adam"] = "adam"
    code_rate: float = 1.0
    scale_rate: float = 0.05
    norm_rate: float = 0.05
    batch_tokens: int = 4096
    checks: int = 4  # measurements of the whole loss
    toward_float: float = 1.0  # the aim: 0 is the float block on these inputs, 1 the float model's stream
    drop: float = 0.0  # share of tokens whose inputs are those of the float stream (Wei et al., QDrop, 2022)
    hold: int = 0  # every so many samples one is not trained on, and those alone judge; 0: all do both
    pull: float = 0.0  # of codes to their start: share of a step's rate for each step of the grid away
    ahead: int = 0  # float blocks behind which errors are judged, fewer at the end of the model
    ahead_share: float = 1.0  # of that loss; the rest is the block's own, each relative to its start
    ahead_limit: float = 1.0  # of a token's gradient through those blocks, in means over the tokens
    noise: float = 0.0  # share of tokens whose inputs are the float stream with the error of another token
    average: float = 0.0  # weight of the past in a running mean of what is trained, judged beside it; 0: none

    def __post_init__(self) -> None:
        if self.ahead < 0:
            raise ValueError(f"ahead is {self.ahead}: expected 0 or more blocks.")
        if not 0 < self.ahead_share <= 1:
            raise ValueError(f"ahead_share is {self.ahead_share}: expected more than 0 and at most 1.")
        if not self.ahead_limit > 0:
            raise ValueError(f"ahead_limit is {self.ahead_limit}: expected more than 0 mean lengths.")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise is {self.noise}: expected a share of the tokens, 0 to 1.")
        if not 0 <= self.average < 1:
            raise ValueError(f"average is {self.average}: expected 0 or more and less than 1.")


LEARNING = Learning()
_STEADY_STEPS = 100  # fewer steps than these are not made longer


def learn_block(
    block: BlockWeights,
    latents: Mapping[str, Tensor],
    config: ModelConfig,
    quant: QuantConfig,
    x: Tensor,
    y: Tensor,
    reports: list[LinearReport],
    metric: Tensor | None = None,
    settings: Learning | None = None,
    float_x: Tensor | None = None,
    ahead: Ahead | None = None,
) -> tuple[BlockWeights, list[LinearReport]]:
    """Train a quantized block so that it maps x to y.

    Args:
        block: Quantized linears, fp16 norms. latents: by role (N, K) float32, where each centred code would go if it
            were free; kept within half a step of its integer, so that nothing changes at first.
        metric: (H, H), what an error is multiplied by before it is squared; None: nothing.
        x: (S, L, H) inputs, those of the quantized model; y: (S, L, H) what is wanted after this block.
        float_x: (S, L, H), the inputs in the float model: what dropped tokens read.
        ahead: float blocks that follow. The loss is then taken behind them, against what they make of y, and the block is
            kept only where its own loss has not risen either.

    Returns the block and the reports with the step and both losses added: mean squared error per element of y, before and
    after; with `ahead`, that behind the last of its blocks too.
    """
    learning = LEARNING if settings is None else settings
    device, steps = x.device, quant.rounding_steps
    flat = FlatLinears.of([block], device)
    start = flat.codes.float()
    wanted = torch.cat([latents[role].view(-1, flat.group_size) for _, role in flat.names])
    latent = torch.maximum(torch.minimum(wanted, start + 0.49), start - 0.49)
    scale_move = torch.zeros_like(flat.scales)
    norms = {role: block.norms[role].to(device).float() for role in NORMS}
    norm_moves = {role: torch.zeros_like(norm) for role, norm in norms.items()}
    max_code = quant.max_code
    parts = Parts(config, x)
    numbers = torch.arange(len(x))
    held = (
        numbers % learning.hold == learning.hold - 1
        if learning.hold
        else torch.zeros(len(x), dtype=torch.bool)
    )
    fit, judges = numbers[~held], numbers[held] if bool(held.any()) else numbers
    size = min(max(1, learning.batch_tokens // x.shape[1]), len(fit))
    metrics = [m if m is None else m.to(device) for m in (metric, ahead.metric if ahead else None)]
    following = [float_block(one, device) for one in ahead.blocks] if ahead else []
    shares = (1 - learning.ahead_share, learning.ahead_share) if following else (1.0,)

    def current() -> BlockWeights:
        scales = fp16_scale(flat.scales * (1 + scale_move))
        dense = RoundToGrid.apply(latent, scales, flat.zeros, max_code)
        moved = {role: fp16_norm(norm * (1 + norm_moves[role])) for role, norm in norms.items()}
        return flat.dense(dense, [moved], device)[0]

    def behind(out: Tensor) -> Tensor:
        attend = training_attend(causal_attend(len(out), x.shape[1], config), device)
        for one in following:
            out = parts.block(out, one, attend=attend)
        return out

    def varied(part: Tensor) -> Tensor:
        """Inputs of a step: some tokens with the error of another one, some with none."""
        inputs = x[part].float()
        if float_x is None or (drops is None and swaps is None):
            return inputs
        good = float_x[part].float()
        if swaps is not None:
            others = swaps.index_select(0, counter)[0]
            inputs = good + (inputs - good).flatten(0, 1).index_select(0, others).view(good.shape)
        if drops is not None:
            inputs = torch.where(drops.index_select(0, counter)[0], good, inputs)
        return inputs

    def errors(part: Tensor, inputs: Tensor, weights: BlockWeights) -> list[Tensor]:
        """Mean squared errors behind the block and, if there are any, behind the blocks ahead."""
        attend = training_attend(causal_attend(len(inputs), x.shape[1], config), device)
        out = parts.block(inputs, weights, attend=attend)
        deltas = [out - y[part].float()]
        if following:
            deltas.append(behind(EvenGradients.apply(out, learning.ahead_limit)) - deep_y[part].float())
        pairs = zip(deltas, metrics, strict=False)
        return [(delta if m is None else delta @ m).pow(2).mean() for delta, m in pairs]

    def whole() -> list[float]:
        weights = current()
        asked = judges.to(device)
        pieces = [asked[part] for part in chunks(len(judges), x.shape[1], device)]
        found = [
            [error * len(piece) for error in errors(piece, x[piece].float(), weights)] for piece in pieces
        ]
        return [float(sum(each)) / len(judges) for each in zip(*found, strict=True)]

    def weighed(losses: Sequence[Any]) -> Any:
        """The loss that is trained: of floats, or of tensors."""
        return sum(loss * gain for loss, gain in zip(losses, gains, strict=True) if gain)

    params = [latent, scale_move, *norm_moves.values()]
    rates = [learning.code_rate, learning.scale_rate] + [learning.norm_rate] * len(norm_moves)
    trained = [p for p, rate in zip(params, rates, strict=True) if rate]
    rates = [rate / max(steps, _STEADY_STEPS) for rate in rates if rate]
    optimizer = (Adam if learning.optimizer == "adam" else SignDescent)(trained, rates)
    order = fit[batches(len(fit), size, steps, quant.seed + 1)].to(device)
    schedule = 1 - torch.arange(steps, device=device, dtype=torch.float32) / steps
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    drops = swaps = None
    if learning.drop and float_x is not None:
        generator = torch.Generator().manual_seed(quant.seed + 3)
        drops = (torch.rand(steps, size, x.shape[1], 1, generator=generator) < learning.drop).to(device)
    if learning.noise and float_x is not None:
        swaps = token_swaps(steps, size, x.shape[1], learning.noise, quant.seed + 4).to(device)
    home = latent.clone() if learning.pull else None
    pull = learning.pull * learning.code_rate / max(steps, _STEADY_STEPS)
    means = [p.clone() for p in trained] if learning.average else []
    gains = [0.0]

    def step() -> None:
        chosen = order.index_select(0, counter)[0]
        with torch.enable_grad():
            for p in trained:
                p.requires_grad_(True)
            grads = torch.autograd.grad(weighed(errors(chosen, varied(chosen), current())), trained)
            for p in trained:
                p.requires_grad_(False)
        with torch.no_grad():
            factor = schedule.index_select(0, counter)
            optimizer.step(grads, factor)
            if home is not None:
                latent.add_((home - latent) * (factor * pull))
            for mean, p in zip(means, trained, strict=False):
                mean.lerp_(p, 1 - learning.average)
            counter.add_(1)

    def put(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        for p, value in zip(into, values, strict=True):
            p.copy_(value)

    with fast_products(), repeatable(), torch.no_grad():
        deep_y = parts.map(lambda h: behind(h.float()).to(h.dtype), y) if following else y
        first = losses = whole()
        # relative to the start: keeps small gradients away from zero
        gains = [share / max(loss, 1e-30) for share, loss in zip(shares, first, strict=True)]
        kept = [p.clone() for p in params]
        runner = Steps(step, device)
        for check in range(learning.checks):
            runner.run(steps * (check + 1) // learning.checks - steps * check // learning.checks)
            reached = [p.clone() for p in trained]
            for candidate in [reached, means] if means else [reached]:
                put(candidate, trained)
                now = whole()
                if weighed(now) < weighed(losses) and now[0] <= first[0]:
                    losses, kept = now, [p.clone() for p in params]
            put(reached, trained)
        put(kept, params)
        codes = torch.clamp(latent.round(), -flat.zeros, max_code - flat.zeros)
        moved = {role: fp16_norm(norm * (1 + norm_moves[role])) for role, norm in norms.items()}
        done = flat.packed(codes, fp16_scale(flat.scales * (1 + scale_move)), [moved])[0]
    values = {"block_before": first[0], "block_after": losses[0]}
    if following:
        values |= {"ahead_before": first[1], "ahead_after": losses[1]}
    names = {role for _, role in flat.names}
    return done, [
        replace(
            report,
            steps=(*report.steps, "rounding") if losses is not first else report.steps,
            values={**report.values, **values},
        )
        if report.role in names
        else report
        for report in reports
    ]


def token_swaps(steps: int, samples: int, length: int, share: float, seed: int) -> Tensor:
    """For each step, whose error each of its samples x length tokens reads, (steps, samples * length) int64, on the CPU.

    A share of the tokens read another one's at random, the rest their own. First tokens, which all others attend to and whose
    errors are of another size, exchange theirs among themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(samples * length).view(samples, length)
    out = own.flatten().repeat(steps, 1)
    for row in out:
        for group in (own[:, 0], own[:, 1:].flatten()):
            hit = group[torch.rand(len(group), generator=generator) < share]
            row[hit] = group[torch.randperm(len(group), generator=generator)[: len(hit)]]
    return out
