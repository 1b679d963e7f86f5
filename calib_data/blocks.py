"""Token ids to calibration blocks: the sampling rule, its checks, and what is recorded of them. Reads no files.

S samples, L tokens a sample.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convert.errors import InputError

COMMON_SHARE = 0.5  # one token filling more of the text than this is worth a warning
DISTINCT_FLOOR = 64  # fewer distinct tokens than this say little about the channels of a model


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration tokens (S, L) int64, where they came from, and what is odd about them.

    `provenance` is plain JSON without absolute paths or times, so it may stand in a manifest.
    """

    tokens: Tensor
    provenance: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def tokens_digest(tokens: Tensor) -> str:
    """sha256 of the ids as little-endian int64."""
    return hashlib.sha256(tokens.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def sample_blocks(
    ids: Tensor, samples: int, seqlen: int, seed: int, allow_fewer: bool, name: str
) -> tuple[Tensor, str]:
    """Blocks (S, L) of a long text's ids (T,), and one sentence saying how they were chosen.

    Rule: starts = torch.randint(0, T - L - 1, (S,)) from a generator with `seed`. A text with fewer than S * L ids is
    refused, or with `allow_fewer` cut into its T // L consecutive blocks. Raises InputError where not one block exists.
    """
    total = int(ids.numel())
    whole = total // seqlen
    if total < samples * seqlen or total <= seqlen + 1:
        if whole == 0:
            raise InputError(
                f"{name} holds {total} tokens, fewer than one sample of {seqlen} (--seqlen). "
                f"Give more text or a smaller --seqlen."
            )
        if not allow_fewer:
            raise InputError(
                f"{name} holds {total} tokens: {whole} sample{'s' if whole > 1 else ''} of {seqlen}, but {samples} were asked for. "
                f"Give more text, say --samples {whole}, or pass --allow-fewer to go on with {whole}."
            )
        return ids[: whole * seqlen].view(
            whole, seqlen
        ), f"the {whole} consecutive blocks that the text holds"
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, total - seqlen - 1, (samples,), generator=generator)
    return torch.stack([ids[s : s + seqlen] for s in starts.tolist()]), f"random starts, seed {seed}"


def check_vocabulary(tokens: Tensor, vocab_size: int, name: str) -> None:
    """Raises InputError when an id is outside [0, vocab_size): the tokenizer belongs to another model."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise InputError(
            f"{name} gives token id {bad}, but the model's vocabulary has {vocab_size} entries: the tokenizer "
            f"belongs to another model. Put this model's own tokenizer files into its folder."
        )


def coverage(tokens: Tensor, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """How much of the vocabulary the blocks (S, L) touch, and warnings where they can teach little."""
    counts = Counter(tokens.flatten().tolist())
    token, most = counts.most_common(1)[0]
    distinct_samples = len({row.numpy().tobytes() for row in tokens.contiguous()})
    share = most / tokens.numel()
    record = {
        "distinct_tokens": len(counts),
        "vocabulary_share": round(len(counts) / vocab_size, 6),
        "distinct_samples": distinct_samples,
        "commonest_token": token,
        "commonest_share": round(share, 6),
    }
    warnings = []
    if distinct_samples < tokens.shape[0]:
        warnings.append(
            f"only {distinct_samples} of {tokens.shape[0]} calibration samples differ: repeated text adds nothing."
        )
    if share > COMMON_SHARE:
        warnings.append(
            f"token {token} is {share:.0%} of the calibration text: channels it does not use stay unseen."
        )
    if len(counts) < min(DISTINCT_FLOOR, tokens.numel()):
        warnings.append(
            f"the calibration text uses {len(counts)} distinct tokens of {vocab_size}: too few to judge a model by."
        )
    return record, warnings
