"""Distillation end to end: group scales and norms of the whole quantized model, trained on the float model's logits.

B samples a step, L tokens a sample, V vocabulary, R groups of all blocks, g group size. Codes and zero points stay as they are:
only what the format leaves free moves. For models that fit on the device whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.checkpoint import BlockWeights
from convert.config import ModelConfig
from convert.families.norms import storable_norm
from quant.block_states import FloatBlock, QuantizedBlock
from quant.config import QuantConfig
from quant.learn.captured_steps import Steps
from quant.learn.model_forward import ModelForward, OuterWeights
from quant.learn.training import (
    Adam,
    FlatLinears,
    ScaleCodes,
    fp16_scale,
    repeatable,
    rise,
    stored_norm,
)
from quant.settings import Distillation
from quant.statistics.gram import fast_products

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


def window_of(config: ModelConfig, text_tokens: int, settings: Distillation) -> tuple[int, int]:
    """(windows of a step, tokens of a window): neither is longer than the model's context or the text."""
    window = min(settings.window, config.max_position, text_tokens)
    return max(1, min(settings.tokens, text_tokens) // window), window


def distill(
    source: Sequence[BlockWeights],
    blocks: Sequence[BlockWeights],
    outer: OuterWeights,
    config: ModelConfig,
    quant: QuantConfig,
    tokens: Tensor,
    device: torch.device | str,
    keeper: Keeper | None = None,
) -> tuple[list[QuantizedBlock], Tensor, DistillReport]:
    """Train the scales and norms of `blocks` as the recipe's settings of distillation say.

    Args:
        source: float blocks; blocks: their quantized forms; outer: of the float model. tokens: (S, L) int64, the calibration text.
        keeper: goes on where it was saved last, in the same bytes; None: nothing is saved or shown.

    Returns the blocks, the final norm (H,) float16 and a report.
    """
    settings, device = quant.recipe.distillation, torch.device(device)
    quantized = [QuantizedBlock.of(block) for block in blocks]
    student = _Student(quantized, outer.final_norm, settings, device)
    teacher = [FloatBlock.of(block).to(device, torch.float32) for block in source]
    windows, length = window_of(config, tokens.numel(), settings)
    text = splice(tokens, settings.steps * windows, length, settings.swap, quant.seed + 2)
    forward = ModelForward(config, outer.float_on(device), windows, length)
    step = _step(student, teacher, forward, text.view(settings.steps, windows * length).to(device), settings)
    with fast_products(), repeatable(), torch.no_grad():
        _run(Steps(step, device), settings.steps, student.state(), keeper, device)
        done, norm = student.packed()
    span, history = max(1, settings.steps // 10), student.history
    report = DistillReport(settings.steps, float(history[:span].mean()), float(history[-span:].mean()))
    return done, storable_norm(norm, quantized[0].norm_offset), report


class _Student:
    """The quantized model while it is trained: how far its scales and norms have moved from where they were."""

    def __init__(
        self,
        blocks: Sequence[QuantizedBlock],
        final_norm: Tensor,
        settings: Distillation,
        device: torch.device,
    ) -> None:
        self._flat, self._device, self._count = FlatLinears.of(blocks, device), device, len(blocks)
        self._norms = {
            (position, role): norm.to(device).float()
            for position, block in enumerate(blocks)
            for role, norm in block.norms.items()
        }
        self._offset = blocks[0].norm_offset
        self._norms[self._count, FINAL] = storable_norm(final_norm.to(device), self._offset).float()
        self._widths = [len(norm) for norm in self._norms.values()]
        self._scale_move = torch.zeros_like(self._flat.scales)
        self._norm_move = torch.zeros(sum(self._widths), device=device)
        self.history = torch.zeros(settings.steps, device=device)  # KL of each step
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)  # steps done
        pairs = ((self._scale_move, settings.scale_rate), (self._norm_move, settings.norm_rate))
        self.trained = [p for p, rate in pairs if rate]
        self.optimizer = Adam(self.trained, [rate for _, rate in pairs if rate])

    def state(self) -> dict[str, Tensor]:
        """All that a step changes, by name."""
        moves = {"scale_move": self._scale_move, "norm_move": self._norm_move}
        state = moves | {"history": self.history, "counter": self.counter}
        return state | {f"adam.{i}": tensor for i, tensor in enumerate(self.optimizer.state())}

    def _moved_norms(self) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The norms of each block, and the final norm (H,)."""
        moves = self._norm_move.split(self._widths)
        by_block: list[dict[str, Tensor]] = [{} for _ in range(self._count + 1)]
        for ((position, role), norm), move in zip(self._norms.items(), moves, strict=True):
            by_block[position][role] = stored_norm(norm * (1 + move), self._offset)
        return by_block[: self._count], by_block[self._count][FINAL]

    def _moved_scales(self) -> Tensor:
        return fp16_scale(self._flat.scales * (1 + self._scale_move))

    def dense(self) -> tuple[list[FloatBlock], Tensor]:
        """Blocks and final norm as they are now, float32, differentiable in what is trained."""
        norms, final = self._moved_norms()
        weights = ScaleCodes.apply(self._flat.codes, self._moved_scales())
        return self._flat.dense(weights, norms, self._device), final

    def packed(self) -> tuple[list[QuantizedBlock], Tensor]:
        """Blocks in packed types and final norm as they are now."""
        norms, final = self._moved_norms()
        return self._flat.packed(self._flat.codes, self._moved_scales(), norms), final


def _step(
    student: _Student,
    teacher: Sequence[FloatBlock],
    forward: ModelForward,
    text: Tensor,
    settings: Distillation,
) -> Callable[[], None]:
    """One step of the training, to be called again and again; everything that changes is a tensor. text: (steps, tokens)."""
    schedule = _schedule(settings.steps, settings.warmup).to(text.device)
    counter, trained = student.counter, student.trained

    def logits(ids: Tensor, blocks: Sequence[FloatBlock], norm: Tensor | None) -> Tensor:
        return forward.logits(forward.through(forward.embed(ids), blocks), norm)

    def step() -> None:
        ids = text.index_select(0, counter)[0]
        with torch.no_grad():
            wanted = logits(ids, teacher, None).log_softmax(-1)
        with torch.enable_grad():
            for p in trained:
                p.requires_grad_(True)
            given = logits(ids, *student.dense()).log_softmax(-1)
            loss = F.kl_div(given, wanted, reduction="sum", log_target=True) / len(ids)
            grads = torch.autograd.grad(loss, trained)
            for p in trained:
                p.requires_grad_(False)
        with torch.no_grad():
            student.optimizer.step(grads, schedule.index_select(0, counter))
            student.history.index_copy_(0, counter, loss.detach()[None])
            counter.add_(1)

    return step


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
