"""Distillation end to end: group scales and norms of the whole quantized model, trained on the float model's logits.

B samples a step, L tokens a sample, V vocabulary, R groups of all blocks, g group size. Codes and zero points stay as they are:
only what the format leaves free moves. For models that fit on the device whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.checkpoint import BlockWeights
from convert.config import ModelConfig
from engine.model.attention import causal_attend
from engine.model.block import block_forward
from engine.model.ops import rms_norm
from engine.model.rope import rotary
from quant.config import QuantConfig
from quant.learn.captured_steps import Steps
from quant.learn.training import (
    Adam,
    FlatLinears,
    ScaleCodes,
    fp16_norm,
    fp16_scale,
    repeatable,
    rise,
    training_attend,
)
from quant.settings import Distillation
from quant.statistics.gram import fast_products
from quant.statistics.parts import float_block

FINAL = "final_norm"


_STRIDE = 20  # steps between two looks, on a GPU


@dataclass(frozen=True)
class DistillReport:
    """KL(float || quantized) per token on the calibration text, mean over the first and the last tenth of the steps."""

    steps: int
    kl_first: float
    kl_last: float


class Keeper(Protocol):
    """Keeps a pass across a kill, and shows how far it is."""

    def load(self) -> dict[str, Tensor] | None:
        """What was saved last of this very pass, or None."""

    def reached(self, done: int, steps: int, kl: float, state: dict[str, Tensor]) -> None:
        """`done` steps are done, the last with this KL; `state` is what to save."""


def window_of(config: ModelConfig, text_tokens: int, how: Distillation) -> tuple[int, int]:
    """(windows of a step, tokens of a window): neither is longer than the model's context or the text."""
    window = min(how.window, config.max_position, text_tokens)
    return max(1, min(how.tokens, text_tokens) // window), window


def distill(
    source: Sequence[BlockWeights],
    blocks: Sequence[BlockWeights],
    config: ModelConfig,
    quant: QuantConfig,
    tokens: Tensor,
    embedding: Tensor,
    final_norm: Tensor,
    head: Tensor,
    device: torch.device | str,
    keeper: Keeper | None = None,
) -> tuple[list[BlockWeights], Tensor, DistillReport]:
    """Train the scales and norms of `blocks` as the recipe's settings of distillation say.

    Args:
        source: float blocks; blocks: their quantized forms. tokens: (S, L) int64, the calibration text.
        embedding, head: (V, H); final_norm: (H,), all of the float model.
        keeper: goes on where it was saved last, in the same bytes; None: nothing is saved or shown.

    Returns the blocks, the final norm (H,) float16 and a report.
    """
    how = quant.recipe.distillation
    device = torch.device(device)
    flat = FlatLinears.of(blocks, device)
    count, window = window_of(config, tokens.numel(), how)
    steps = how.steps
    text = (
        splice(tokens, steps * count, window, how.swap, quant.seed + 2).view(steps, count * window).to(device)
    )
    embedding, head = embedding.to(device).float(), head.to(device).float()
    positions = torch.arange(window, device=device).repeat(count)
    angles = rotary(config, positions)
    attend = training_attend(causal_attend(count, window, config), device)
    teacher = [float_block(block, device) for block in source]
    wanted_norm = final_norm.to(device).float()

    names = [(position, role) for position, block in enumerate(blocks) for role in block.norms]
    start = {name: blocks[name[0]].norms[name[1]].to(device).float() for name in names}
    start[len(blocks), FINAL] = final_norm.to(device).half().float()
    widths = [len(norm) for norm in start.values()]
    scale_move = torch.zeros_like(flat.scales)
    norm_move = torch.zeros(sum(widths), device=device)
    history = torch.zeros(steps, device=device)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    schedule = _schedule(steps, how.warmup).to(device)

    def norms() -> tuple[list[dict[str, Tensor]], Tensor]:
        moved = {
            name: fp16_norm(norm * (1 + move))
            for (name, norm), move in zip(start.items(), norm_move.split(widths), strict=True)
        }
        by_block: list[dict[str, Tensor]] = [{} for _ in blocks]
        for position, role in names:
            by_block[position][role] = moved[position, role]
        return by_block, moved[len(blocks), FINAL]

    def logits(ids: Tensor, dense: Sequence[BlockWeights], norm: Tensor) -> Tensor:
        x = F.embedding(ids, embedding)
        for block in dense:
            x = block_forward(x, positions, block, config, attend, angles=angles)
        return F.linear(rms_norm(x, norm, config.norm_eps), head)

    params = [p for p, rate in ((scale_move, how.scale_rate), (norm_move, how.norm_rate)) if rate]
    optimizer = Adam(params, [rate for rate in (how.scale_rate, how.norm_rate) if rate])

    def step() -> None:
        ids = text.index_select(0, counter)[0]
        with torch.no_grad():
            wanted = logits(ids, teacher, wanted_norm).log_softmax(-1)
        with torch.enable_grad():
            for p in params:
                p.requires_grad_(True)
            by_block, norm = norms()
            dense = ScaleCodes.apply(flat.codes, fp16_scale(flat.scales * (1 + scale_move)))
            given = logits(ids, flat.dense(dense, by_block, device), norm).log_softmax(-1)
            loss = F.kl_div(given, wanted, reduction="sum", log_target=True) / len(ids)
            grads = torch.autograd.grad(loss, params)
            for p in params:
                p.requires_grad_(False)
        with torch.no_grad():
            optimizer.step(grads, schedule.index_select(0, counter))
            history.index_copy_(0, counter, loss.detach()[None])
            counter.add_(1)

    with fast_products(), repeatable(), torch.no_grad():
        state = {"scale_move": scale_move, "norm_move": norm_move, "history": history, "counter": counter}
        state |= {f"adam.{i}": tensor for i, tensor in enumerate(optimizer.state())}
        _run(Steps(step, device), steps, state, keeper, device)
        by_block, norm = norms()
        done = flat.packed(flat.codes, fp16_scale(flat.scales * (1 + scale_move)), by_block)
    span = max(1, steps // 10)
    report = DistillReport(steps, float(history[:span].mean()), float(history[-span:].mean()))
    return done, norm.half(), report


def _run(
    runner: Steps, steps: int, state: dict[str, Tensor], keeper: Keeper | None, device: torch.device
) -> None:
    """All steps, from where the keeper left off; a few at a time on a GPU, where asking for the KL waits for them."""
    if keeper is None:
        runner.run(steps)
        return
    if (saved := keeper.load()) is not None:
        for name, tensor in state.items():
            tensor.copy_(saved[name])
    stride = 1 if device.type == "cpu" else _STRIDE
    done = int(state["counter"])
    while done < steps:
        runner.run(min(stride, steps - done))
        done = int(state["counter"])
        keeper.reached(done, steps, float(state["history"][done - 1]), state)


def splice(tokens: Tensor, windows: int, length: int, swap: float, seed: int) -> Tensor:
    """Windows (W, length) of pieces of the samples (S, L), so that no step repeats a context: int64, on the CPU.

    A piece starts anywhere in a sample and has from L / 8 tokens to the rest of it. In each window a share of the tokens, drawn
    between 0 and `swap`, is replaced by tokens from random places of the same text.
    """
    generator = torch.Generator().manual_seed(seed)
    samples, size = tokens.shape
    tokens = tokens.cpu()
    pool = tokens.flatten()
    out = torch.empty(windows, length, dtype=torch.int64)
    shortest = max(1, size // 8)
    order: list[int] = []
    for window in out:
        filled = 0
        while filled < length:
            order = order or torch.randperm(samples, generator=generator).tolist()
            start = int(torch.randint(0, size - shortest + 1, (1,), generator=generator))
            piece = tokens[order.pop(), start:][: length - filled]
            window[filled : filled + len(piece)] = piece
            filled += len(piece)
        share = swap * torch.rand(1, generator=generator)
        hit = torch.rand(length, generator=generator) < share
        window[hit] = pool[torch.randint(0, len(pool), (int(hit.sum()),), generator=generator)]
    return out


def _schedule(steps: int, warmup: float) -> Tensor:
    """Linear rise, then half a cosine down to zero: (steps,)."""
    return rise(steps, warmup) * 0.5 * (1 + torch.cos(torch.pi * torch.arange(steps) / steps))
