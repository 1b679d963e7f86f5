"""How likely the model finds the tokens of a prompt: log-probabilities of given tokens, their ranks and the likeliest others.

n tokens of a segment, V vocabulary, k alternatives. Logits are computed for `ROWS` tokens at a time, because those of a whole
chunk would take gigabytes, and always for that many, because on the CPU their bits depend on the number of rows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROWS = 64


def score(
    hidden: Tensor, targets: Sequence[int], count: int, head: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (n, hidden size) of the tokens before `targets` -> log-probabilities (n,) float32 of the targets by log-softmax of
    the model's own logits, their ranks (n,) int64, counted from 1, and the `count` likeliest ids and log-probabilities (n, count)."""
    parts = []
    wanted = torch.tensor(list(targets), dtype=torch.int64, device=hidden.device)
    for start in range(0, len(targets), ROWS):
        rows = hidden[start : start + ROWS]
        size = len(rows)
        if size < ROWS:
            rows = torch.cat([rows, rows[:1].expand(ROWS - size, -1)])
        logprobs = torch.log_softmax(head(rows)[:size].float(), dim=-1)  # (size, V)
        chosen = logprobs.gather(1, wanted[start : start + size, None])
        top = logprobs.topk(min(count, logprobs.shape[1]), dim=-1)
        parts.append((chosen[:, 0], (logprobs > chosen).sum(-1) + 1, top.indices, top.values))
    logprobs, ranks, ids, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return logprobs, ranks, ids, values
