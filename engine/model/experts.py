"""Mixtures of experts: which experts a token goes through and with what weights, and the sum of what they give.

T tokens, H hidden size, E experts, k experts of a token.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from convert.config import ModelConfig


def route(logits: Tensor, config: ModelConfig, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Router logits (T, E), bias (E,) float32 -> weights (T, k) float32 and experts (T, k) int64 of each token.

    Softmax or sigmoid in float32. With groups, the eligible experts are those of the groups whose two best scores have the
    largest sums (DeepSeek-V3, 2024). The bias counts for the choice, not in the weights.
    """
    router = config.router
    logits = logits.float()
    scores = logits.softmax(-1) if router.scores == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if router.groups > 1:
        grouped = choice.unflatten(-1, (router.groups, -1))  # (T, groups, E / groups)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(router.top_groups, dim=-1).indices
        eligible = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=logits.device)
        eligible = eligible.scatter(1, best, torch.ones_like(best, dtype=torch.bool))
        choice = grouped.masked_fill(~eligible[..., None], -torch.inf).flatten(1)
    chosen = choice.topk(config.experts_per_token, dim=-1).indices
    weights = scores.gather(1, chosen)
    if router.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return weights * router.scale if router.scale != 1.0 else weights, chosen


def weighted_sum(
    h: Tensor, weights: Tensor, chosen: Tensor, experts: int, run: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Sum over each token's experts of weight * run(expert, its tokens): h (T, H) -> (T, H) in the dtype of h."""
    out = torch.zeros_like(h)
    for expert in range(experts):
        tokens, place = torch.where(chosen == expert)
        if len(tokens):
            result = run(expert, h[tokens])
            out = out.index_add(0, tokens, (result * weights[tokens, place, None]).to(out.dtype))
    return out
