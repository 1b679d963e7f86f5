"""What comes after a block that learns its rounding: the float blocks through which its errors go on, and their cost behind them.

H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint


class EvenGradients(torch.autograd.Function):
    """The identity for hidden states h (s, L, H); going back, no token's gradient is longer than `limit` times the mean length.

    Where the next block first gives some tokens their huge activations, two tokens in 2048 would make up four fifths of the
    squared gradient, and steps of even size would follow these two.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        lengths = grads[0].norm(dim=-1, keepdim=True)
        longest = ctx.limit * lengths.mean()
        return grads[0] * (longest / lengths.clamp(min=1e-30)).clamp(max=1.0), None


@dataclass(frozen=True)
class Ahead:
    """The next float blocks in their order, at least one, and the metric (H, H) of an error behind the last; None: the identity."""

    blocks: tuple[BlockWeights, ...]
    metric: Tensor | None = None


class Upcoming:
    """The blocks of a checkpoint for a walk that looks ahead: each is read once, and given up when the walk is past it."""

    def __init__(self, ckpt: Checkpoint, count: int, metrics: Sequence[Tensor] | None) -> None:
        """count: blocks to look ahead; metrics: one for each block of the model, or None."""
        self._ckpt, self._count, self._metrics = ckpt, count, metrics
        self._held: dict[int, BlockWeights] = {}

    def block(self, index: int) -> BlockWeights:
        """A block; those before it are given up."""
        self._held = {held: block for held, block in self._held.items() if held >= index}
        return self._read(index)

    def after(self, index: int) -> Ahead | None:
        """What follows this block: fewer blocks near the end of the model, None after the last one."""
        last = min(index + self._count, self._ckpt.config.num_layers - 1)
        if last <= index:
            return None
        blocks = tuple(self._read(following) for following in range(index + 1, last + 1))
        return Ahead(blocks, self._metrics[last] if self._metrics else None)

    def _read(self, index: int) -> BlockWeights:
        if index not in self._held:
            self._held[index] = self._ckpt.block(index)
        return self._held[index]
