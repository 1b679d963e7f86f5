"""Texts as windows of tokens, and the forward pass over them: what perplexity and its comparisons run on.

W windows of L tokens, T tokens of a batch, H hidden size. Batches go through all blocks one after another, or, for a
streamed model, all batches go through one block before the next is read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from convert.config import ModelConfig
from convert.errors import InputError, UsageError
from engine.model.attention import Attend
from engine.model.forward import Model, StreamedBlocks

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}

AttendFactory = Callable[[int, int, ModelConfig], Attend]  # batch, length, config
Progress = Callable[
    [int, int], None
]  # batches done, batches in all; one block of a streamed pass counts as one


class Tokenizer(Protocol):
    """What is asked of a tokenizer: ids with the model's own rule for a leading BOS, and a digest."""

    def encode(self, text: str) -> list[int]: ...

    def digest(self) -> str: ...


@dataclass(frozen=True)
class EvalTokens:
    """A tokenized text. ids (N,) int64; `bos`: the first of them is the model's BOS."""

    ids: Tensor
    bos: bool
    text: str  # its name, for the record
    text_digest: str
    tokenizer_digest: str


def tokenize(text: str, name: str, text_digest: str, tokenizer: Tokenizer, config: ModelConfig) -> EvalTokens:
    """The whole text at once. Raises InputError for a token that the model does not have."""
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        raise InputError(
            f"The tokenizer gives token {int(ids.max())}, but the model's vocabulary has {config.vocab_size} tokens: "
            "the tokenizer belongs to another model."
        )
    bos = bool(len(ids)) and int(ids[0]) == config.bos_token_id
    return EvalTokens(ids, bos, name, text_digest, tokenizer.digest())


def cut_windows(tokens: EvalTokens, seqlen: int, config: ModelConfig, limit: int | None = None) -> Tensor:
    """(W, L) int64: the first `limit` windows (None: all). Raises InputError where the text is shorter than one."""
    if seqlen < 2:
        raise UsageError(
            f"--seqlen is {seqlen}: a window needs at least 2 tokens, one to predict from the other."
        )
    if seqlen > config.max_position:
        raise UsageError(
            f"--seqlen is {seqlen}, but the model's context is {config.max_position} tokens: ask for at most that."
        )
    count = len(tokens.ids) // seqlen
    if count == 0:
        raise InputError(
            f"{tokens.text} has {len(tokens.ids)} tokens, which is less than one window of {seqlen}. "
            "Give a longer text or a smaller --seqlen."
        )
    windows = tokens.ids[: count * seqlen].view(count, seqlen)
    return windows if limit is None else windows[:limit]


@torch.no_grad()
def forward_windows(
    model: Model, windows: Tensor, make_attend: AttendFactory, progress: Progress | None = None
) -> Iterator[Tensor]:
    """Normed hidden states (L, H) of each window of windows (W, L), in order.

    A streamed model reads each block once for all windows, so W * L * H elements are held; any other runs batch by batch.
    """
    length = windows.shape[1]
    size = max(1, BATCH_TOKENS.get(model.device.type, 2048) // length)
    batches = windows.split(size)
    is_streamed = isinstance(model.blocks, StreamedBlocks)
    groups: Sequence[Sequence[Tensor]] = [batches] if is_streamed else [[batch] for batch in batches]
    steps = len(model.blocks) if is_streamed else len(groups)
    for done, group in enumerate(groups):
        ticks = (lambda block: progress(block, steps)) if progress is not None and is_streamed else None
        for hidden in _forward(model, group, make_attend, ticks):
            yield from hidden.view(-1, length, hidden.shape[-1])
        if progress is not None and not is_streamed:
            progress(done + 1, steps)


def _forward(
    model: Model, batches: Sequence[Tensor], make_attend: AttendFactory, tick: Callable[[int], None] | None
) -> Iterator[Tensor]:
    """Each batch (B, L) -> normed hidden states (B * L, H); block by block over all of them."""
    length = batches[0].shape[1]
    states = [model.embed(batch.flatten().to(model.device)) for batch in batches]
    plans = {}
    for rows in {len(batch) for batch in batches}:
        positions = torch.arange(length, device=model.device).repeat(rows)
        plans[rows] = (positions, model.rotary(positions), make_attend(rows, length, model.config))
    for done, block in enumerate(model.blocks):
        for i, batch in enumerate(batches):
            positions, angles, attend = plans[len(batch)]
            states[i] = block(states[i], positions, attend, angles=angles)
        if tick is not None:
            tick(done + 1)
    return (model.norm(state) for state in states)
