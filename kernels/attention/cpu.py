"""Decode attention in torch for a whole batch at once, page by page, in float32: on the CPU, and for what kernels do not have.

B sequences, N pages that they read in all, Hq query and Hkv key/value heads, G = Hq / Hkv, D head_dim, P tokens of a page.
Formula: the softmax of `kernels/attention/paged.py`, as a sum over pages of exp(scale * q K^T - peak) V, divided by the sum of the exponentials.
Every product has the shape of one page and sums over pages run in their order, so that the bits of a sequence's result do
not depend on who shares its batch.
"""

import torch
from torch import Tensor

from kernels.kv.int8 import dequantize_kv, unpack_halves
from kernels.kv.pages import KVCache


class PagedDecode:
    """What all layers of one step share: which page belongs to which sequence, and which of its tokens are seen."""

    def __init__(
        self, block_tables: Tensor, context_lens: Tensor, block_size: int, window: int | None = None
    ) -> None:
        """block_tables (B, W) int32, context_lens (B,) int32, all at least 1."""
        lengths = context_lens.long()
        counts = (lengths + block_size - 1) // block_size  # (B,) pages of each sequence
        device = block_tables.device
        columns = torch.arange(block_tables.shape[1], device=device)
        kept = columns < counts[:, None]
        if window is not None:
            kept &= (columns + 1) * block_size > (lengths - window)[:, None]
        self.owner, column = kept.nonzero(as_tuple=True)  # (N,) each, by sequence and then by page
        pages = block_tables[kept].long()  # (N,)
        first = int(pages[0])
        is_run = torch.equal(pages, torch.arange(first, first + len(pages), device=device))
        # a run of pages is read in place, others are copied
        self.pages = slice(first, first + len(pages)) if is_run else pages
        position = column[:, None] * block_size + torch.arange(block_size, device=device)  # (N, P)
        ends = lengths[self.owner, None]
        seen = position < ends
        if window is not None:
            seen &= position >= ends - window
        self.hidden = ~seen[:, None, None]  # (N, 1, 1, P)

    def __call__(self, q: Tensor, cache: KVCache, scale: float, softcap: float | None = None) -> Tensor:
        """Attention of q (B, Hq, D) over the pages, float32 inside: (B, Hq, D). Scores s become softcap * tanh(s / softcap)."""
        batch, heads, size = q.shape
        dtype, q = q.dtype, q.float()
        grouped = q.view(batch, cache.num_kv_heads, -1, size)  # (B, Hkv, G, D)
        k, v = (_read(cache, self.pages, index) for index in range(2))  # (N, Hkv, P, D)
        scores = grouped[self.owner] @ k.transpose(2, 3) * scale  # (N, Hkv, G, P)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(self.hidden, -torch.inf)
        peak = grouped.new_full(grouped.shape[:3], -torch.inf)
        peaks = scores.amax(-1)  # (N, Hkv, G)
        peak.scatter_reduce_(0, self.owner[:, None, None].expand_as(peaks), peaks, "amax")
        weights = scores.sub_(peak[self.owner][..., None]).exp_()
        total = torch.zeros_like(peak).index_add_(0, self.owner, weights.sum(-1))
        out = torch.zeros_like(grouped).index_add_(0, self.owner, weights @ v)
        return out.div_(total[..., None]).view(batch, heads, size).to(dtype)


def _read(cache: KVCache, pages: Tensor | slice, index: int) -> Tensor:
    """Keys (index 0) or values (1) of these pages, float32 (N, Hkv, P, D)."""
    raw = (cache.k, cache.v)[index][pages]
    if cache.bits == 16:
        return raw.float()
    if cache.params is None:
        assert cache.static is not None
        scale, zero = (cache.static[2 * index + part][:, None] for part in range(2))  # (Hkv, 1)
    else:
        scale, zero = cache.params[pages, :, index].unbind(-1)  # (N, Hkv, P)
    return dequantize_kv(unpack_halves(raw), scale, zero)
