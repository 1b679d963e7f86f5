"""The presets as data: which steps each one takes, and how much work each step may be."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quant.config import Preset
from quant.search.scales.clip import banded_pairs, shrink_pairs


@dataclass(frozen=True)
class Plan:
    """The steps of a preset, in the order in which they are taken."""

    source: Literal["float", "quantized"] = "quantized"  # the stream that a linear's inputs are taken from
    scale: bool = False  # channel scales and clip ranges, chosen together by the Gram form
    toward_float: float = 0.0  # most of the way to the weights that best meet the float stream's outputs
    compensate: Literal["none", "published", "static"] = "none"
    rounds: int = 0  # of integer descent and scale refit
    refit: bool = False  # scale refit alone
    learn: bool = False  # rounding and ranges trained on the output of the block


PLANS: dict[Preset, Plan] = {
    "gptq": Plan(compensate="published"),
    "gptq-r": Plan(compensate="static"),
    "fast": Plan(scale=True, refit=True),
    "default": Plan(scale=True, toward_float=1.0, compensate="static", rounds=2),
    "best": Plan(scale=True, toward_float=1.0, compensate="static", rounds=2, learn=True),
}


@dataclass(frozen=True)
class Effort:
    """Sizes of the searches. A CPU judges channel scales on fewer rows and ranges; the steps are the same."""

    alpha_steps: int
    score_rows: int  # rows of a stack on which candidates are judged
    score_steps: int  # shrink factors while candidates are judged
    clip_steps: int  # shrink factors of the ranges that are kept
    banded: bool
    rounds: int  # of descent and refit, at most
    sweeps: int  # of descent in a round

    def pairs(self, steps: int, bits: int, device: torch.device) -> Tensor:
        """Shrink factors (P, 2); fewer bits shrink further."""
        lowest = {4: 0.55, 3: 0.45, 2: 0.35}[bits]
        return (banded_pairs if self.banded else shrink_pairs)(steps, lowest, device)


def effort_on(device: torch.device) -> Effort:
    """How hard to search on this kind of device."""
    if device.type == "cpu":
        return Effort(
            alpha_steps=10, score_rows=128, score_steps=3, clip_steps=6, banded=True, rounds=1, sweeps=1
        )
    return Effort(
        alpha_steps=20, score_rows=1 << 30, score_steps=5, clip_steps=11, banded=False, rounds=4, sweeps=3
    )
