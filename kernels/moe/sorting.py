"""Token-expert pairs in the order of their experts, cut into blocks of one expert each. Plain torch, no wait for the device.

T tokens, k experts of a token, A = T * k pairs (pair a belongs to token a // k), E experts, BM pairs of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SortedPairs:
    """order (A,) int32: pairs by expert, those of one expert in the order of tokens. For each of B blocks: expert (B,) int32,
    -1 where the block is not used; first (B,) int32, its first place in `order`. end (E,) int32: behind the last of each expert.
    """

    order: Tensor
    expert: Tensor
    first: Tensor
    end: Tensor

    @property
    def blocks(self) -> int:
        return self.expert.shape[0]


def most_blocks(pairs: int, experts: int, bm: int) -> int:
    """How many blocks A pairs can need at most: one part-filled block for each expert that is chosen."""
    return min(pairs, pairs // bm + min(experts, pairs))


def sort_pairs(chosen: Tensor, experts: int, bm: int) -> SortedPairs:
    """chosen (T, k) integers below E -> pairs sorted by expert."""
    flat = chosen.reshape(-1)
    places, order = torch.sort(flat, stable=True)
    ids = torch.arange(experts, device=flat.device, dtype=places.dtype)
    end = torch.searchsorted(places, ids, right=True)  # (E,)
    begin = torch.cat((end.new_zeros(1), end[:-1]))
    last_block = ((end - begin + bm - 1) // bm).cumsum(0)  # (E,): blocks of this expert and those ahead
    block = torch.arange(most_blocks(flat.shape[0], experts, bm), device=flat.device)
    expert = torch.searchsorted(last_block, block, right=True)  # E where the block is not used
    used = expert.clamp(max=experts - 1)
    ahead = torch.where(used > 0, last_block[used - 1], 0)
    first = begin[used] + (block - ahead) * bm
    expert = torch.where(expert < experts, expert, -1)
    return SortedPairs(order.int(), expert.int(), first.int(), end.int())
