"""Calibration text that the model writes itself, through a `generate` callable. Needs no file and no network.

Each sample starts with one token drawn uniformly from the ordinary vocabulary (after the model's own BOS, if its rule
asks for one) and goes on with tokens sampled at temperature 1, end-of-text tokens barred, as in data-free
calibration (LLM-QAT, arXiv 2305.17888; self-generated calibration, arXiv 2410.17170).

S samples, L tokens a sample.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

SOURCE = "generated"


class Generate(Protocol):
    """Continues prompts (S, P) int64 to (S, L) by sampling at temperature 1 from `seed`; `barred` ids are never drawn."""

    def __call__(self, prompts: Tensor, length: int, seed: int, barred: tuple[int, ...]) -> Tensor: ...


def generated_rule(bos: int | None) -> dict[str, Any]:
    """The recipe as plain JSON, for the fingerprint: the text follows from it, the model and the seed."""
    return {
        "source": SOURCE,
        "start": "uniform ordinary token",
        "temperature": 1.0,
        "bos": bos,
        "eos": "barred",
    }


def generate_blocks(
    generate: Generate,
    vocab_size: int,
    special_ids: tuple[int, ...],
    bos: int | None,
    samples: int,
    seqlen: int,
    seed: int,
) -> Tensor:
    """Blocks (S, L) int64 written by the model. special_ids are neither starts nor drawn."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.ones(vocab_size)
    ordinary[[i for i in special_ids if 0 <= i < vocab_size]] = 0
    starts = torch.multinomial(ordinary, samples, replacement=True, generator=generator)[:, None]  # (S, 1)
    if bos is not None:
        starts = torch.cat([torch.full_like(starts, bos), starts], dim=1)  # (S, 2)
    return generate(starts[:, :seqlen], seqlen, seed, special_ids)
