"""The forward pass of a whole model in float32, differentiable: for gradients of its own predictions and for distillation.

T tokens, V vocabulary, H hidden size. For models that fit on the device whole.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint
from convert.config import ModelConfig
from engine.model.attention import causal_attend
from engine.model.block import block_forward
from engine.model.ends import embed, finish_logits
from engine.model.ops import rms_norm
from engine.model.rope import rotary
from quant.learn.training import training_attend


@dataclass(frozen=True)
class OuterWeights:
    """The weights outside the blocks: embedding and head (V, H), final_norm (H,)."""

    embedding: Tensor
    final_norm: Tensor
    head: Tensor

    @staticmethod
    def of(ckpt: Checkpoint) -> "OuterWeights":
        """Read from a checkpoint; tied embeddings are one tensor."""
        embedding = ckpt.embedding()
        head = embedding if ckpt.config.tie_embeddings else ckpt.lm_head()
        return OuterWeights(embedding, ckpt.final_norm(), head)

    def float_on(self, device: torch.device) -> "OuterWeights":
        """In float32 on the device."""
        embedding = self.embedding.to(device).float()
        head = embedding if self.head is self.embedding else self.head.to(device).float()
        return OuterWeights(embedding, self.final_norm.to(device).float(), head)


class ModelForward:
    """The pass over `windows` windows of `length` tokens; what does not change between passes is computed once."""

    def __init__(self, config: ModelConfig, outer: OuterWeights, windows: int, length: int) -> None:
        """outer: float32, on the device of the pass."""
        device = outer.embedding.device
        self._config, self._outer = config, outer
        self._positions = torch.arange(length, device=device).repeat(windows)
        self._angles = rotary(config, self._positions)
        self._attend = training_attend(causal_attend(windows, length, config), device)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (T,) int64 -> hidden states (T, H)."""
        return embed(ids, self._outer.embedding, self._config)

    def states(self, x: Tensor, blocks: Iterable[BlockWeights]) -> Iterator[Tensor]:
        """The hidden states (T, H) after each block, for x before the first."""
        for block in blocks:
            x = block_forward(x, self._positions, block, self._config, self._attend, angles=self._angles)
            yield x

    def through(self, x: Tensor, blocks: Iterable[BlockWeights]) -> Tensor:
        """The hidden states (T, H) after the last of these blocks."""
        for state in self.states(x, blocks):
            x = state
        return x

    def logits(self, x: Tensor, final_norm: Tensor | None = None) -> Tensor:
        """Hidden states after the last block -> (T, V), through this final norm (None: the model's own)."""
        norm = self._outer.final_norm if final_norm is None else final_norm
        return finish_logits(
            F.linear(rms_norm(x, norm, self._config.norm_eps), self._outer.head), self._config
        )
