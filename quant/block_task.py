"""What passes between the search and the run: streams of hidden states in, quantized blocks and reports out. No I/O.

S samples, L tokens a sample, H hidden size, K in features of a linear.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from convert.config import ModelConfig
from engine.model.block import Tap
from quant.block_states import FloatBlock, QuantizedBlock
from quant.config import QuantConfig
from quant.statistics.gram import InputStatistics


@dataclass(frozen=True)
class Streams:
    """Hidden states before (or after) a block: `fp` of the float model, `quantized` of the model quantized so far.

    Both (S, L, H) in the compute dtype; before the first block they are equal and may be the same tensor.
    """

    fp: Tensor
    quantized: Tensor


# Saved statistics of the float stream by the name of the input ("attn_in", ...) stand in place of streams (`--stats`).
BlockInputs = Streams | Mapping[str, InputStatistics] | None


@dataclass(frozen=True)
class BlockTask:
    """One block to quantize, and what its search may look at: what the function of a recipe gets.

    Args:
        weights: the float block. quant: its configuration, `quant.recipe` its recipe.
        inputs: hidden states before the block; statistics of the float stream in their place; None where no text is read.
        dtype: of the forward passes; the search itself computes in float32.
        tap: sees "k" and "v" of the quantized block. metric: (H, H), what errors of the block's output cost; None: the same.
    """

    weights: FloatBlock
    config: ModelConfig
    quant: QuantConfig
    inputs: BlockInputs
    device: torch.device
    dtype: torch.dtype
    tap: Tap | None = None
    metric: Tensor | None = None


@dataclass(frozen=True)
class LinearReport:
    """What happened to one linear. Losses are tr(dW G dW^T), or what its preset judges, on the calibration text."""

    role: str
    shape: tuple[int, int]
    loss_rtn: float  # round to nearest of the same weights on the same inputs
    loss_before: float  # at the start of the last step
    loss_after: float
    steps: tuple[str, ...] = ()  # the steps that were kept, in order: "scale", "clip", "gptq", ...
    warnings: tuple[str, ...] = ()
    values: dict[str, float] = field(
        default_factory=dict
    )  # for instance alpha, damping, share of clipped groups

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def dead_channels(count: int) -> str:
    """The warning about input channels that no token of the text uses."""
    return f"{count} input channels are zero in every token"


@dataclass(frozen=True)
class BlockResult:
    """A quantized block: `weights` with folded norms; `streams` after it (None from statistics)."""

    weights: QuantizedBlock
    reports: tuple[LinearReport, ...]
    streams: Streams | None
