"""Attention over the paged cache: decode (one query token a sequence) and prefill (the last tokens of each sequence).

B sequences, Hq query heads, Hkv key/value heads, D head_dim, P tokens of a page. Formula, for each query head h of kv head
h // (Hq / Hkv): softmax(scale * q K^T + mask) V over the keys of the sequence, all in fp32 except the two products, whose
operands are 16 bit on the GPU. With `window` w a query at position i sees the keys i - w + 1 .. i. CPU tensors take the torch
reference, CUDA tensors the Triton kernels of `attention_triton.py`. Knows nothing of requests or of how pages are shared out.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.operands import DecodeWorkspace, NewTokens
from kernels.block.fused import check_rope_store, rope_store_reference
from kernels.kv.int8 import gather_kv, gather_kv_reference
from kernels.kv.pages import KVCache


def decode_attention(
    q: Tensor,
    cache: KVCache,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    *,
    workspace: DecodeWorkspace | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Attention of one new token of each sequence, whose key and value are in the cache already; (B, Hq, D) of q's dtype.

    Args:
        q: (B, Hq, D), after RoPE.
        block_tables: (B, max_blocks) int32, pages of each sequence in order; entries past its length are never read.
        context_lens: (B,) int32, tokens of each sequence with the new one. 0 (an unused row) gives zeros.
        workspace: from `allocate_workspace`; without it, scratch is allocated by the call.
        out: (B, Hq, D) to write into.
        pdl: programmatic dependent launch, as in `fused`; context_lens and block_tables must then be older than the kernel
            launched just before.

    No host sync on CUDA; the grid depends on shapes alone, so a captured graph serves any lengths that fit block_tables.
    Bit-identical from run to run. Raises ValueError on shapes, dtypes or devices that do not fit together.
    """
    check_decode(q, cache, block_tables, context_lens, window, out)
    if q.is_cuda:
        from kernels.attention.launch import launch_decode

        return launch_decode(q, cache, block_tables, context_lens, scale, window, workspace, out, pdl=pdl)
    result = decode_attention_reference(q, cache, block_tables, context_lens, scale, window)
    return result if out is None else out.copy_(result)


def rope_decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    q_scale: Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """`rope_store` and `decode_attention` as one kernel: from the qkv product of a decode step to its attention, (B, Hq, D).

    Arguments as in these two, T being B. Row b is the last token of sequence b: its key and value go to position
    context_lens[b] - 1, the slot that block_tables gives. A row of length 0 stores nothing and gives zeros.
    """
    num_heads = check_rope_store(qkv, cos, sin, cache, None, q_norm, k_norm, q_scale)
    heads = qkv.view(qkv.shape[0], -1, cache.head_dim)  # (B, Hq + 2 Hkv, D)
    check_decode(heads[:, :num_heads], cache, block_tables, context_lens, window, out)
    if qkv.is_cuda:
        from kernels.attention.launch import launch_decode

        new = NewTokens(cos.contiguous(), sin.contiguous(), q_norm, k_norm, eps, q_scale)
        return launch_decode(
            heads, cache, block_tables, context_lens, scale, window, workspace, out, new=new, pdl=pdl
        )
    last = (context_lens.long() - 1).clamp(min=0)
    slots = block_tables.gather(1, last[:, None] // cache.block_size)[:, 0].long() * cache.block_size
    slots = torch.where(context_lens > 0, slots + last % cache.block_size, -1)
    q = rope_store_reference(qkv, cos, sin, cache, slots, q_norm, k_norm, eps, q_scale)
    result = decode_attention_reference(q, cache, block_tables, context_lens, scale, window)
    return result if out is None else out.copy_(result)


def allocate_workspace(
    max_batch: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device | str
) -> DecodeWorkspace:
    """Scratch for any batch up to max_batch; one serves all layers, since they run one after another."""
    if torch.device(device).type == "cuda":
        from kernels.attention.units import max_units

        units = max_units(max_batch, num_kv_heads, device)
    else:
        units = 0
    return DecodeWorkspace(
        torch.empty(units, num_heads, head_dim, dtype=torch.float32, device=device),
        torch.empty(units, num_heads, dtype=torch.float32, device=device),
        torch.zeros(max_batch * num_kv_heads, dtype=torch.int32, device=device),
    )


def check_decode(
    q: Tensor,
    cache: KVCache,
    block_tables: Tensor,
    context_lens: Tensor,
    window: int | None,
    out: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of `decode_attention` fit together."""
    if q.ndim != 3 or q.shape[2] != cache.head_dim or q.shape[1] % cache.num_kv_heads:
        raise ValueError(
            f"q is {tuple(q.shape)}, expected (B, Hq, {cache.head_dim}) with Hq a multiple of {cache.num_kv_heads}."
        )
    if block_tables.ndim != 2 or block_tables.shape[0] != q.shape[0] or block_tables.dtype != torch.int32:
        raise ValueError(
            f"block_tables is {tuple(block_tables.shape)} {block_tables.dtype}, expected ({q.shape[0]}, max_blocks) int32."
        )
    if tuple(context_lens.shape) != (q.shape[0],) or context_lens.dtype != torch.int32:
        raise ValueError(
            f"context_lens is {tuple(context_lens.shape)} {context_lens.dtype}, expected ({q.shape[0]},) int32."
        )
    if not q.device == cache.k.device == block_tables.device == context_lens.device:
        raise ValueError(
            f"q, cache, block_tables and context_lens lie on {q.device}, {cache.k.device}, {block_tables.device}, "
            f"{context_lens.device}: expected one device."
        )
    if window is not None and window < 1:
        raise ValueError(f"window {window}: expected at least 1 token, or None for full attention.")
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous()):
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype}, expected contiguous {tuple(q.shape)} {q.dtype}."
        )


def decode_attention_reference(
    q: Tensor,
    cache: KVCache,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """The same as `decode_attention` in torch, fp32 throughout, one sequence at a time."""
    out = torch.zeros_like(q)
    for row, length in enumerate(context_lens.tolist()):
        if length:
            k, v = gather_kv_reference(cache, block_tables[row], length, torch.float32)
            out[row] = _attend(q[row : row + 1].float(), k, v, scale, window)[0].to(q.dtype)
    return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None = None
) -> Tensor:
    """The last T positions of one sequence: q (T, Hq, D), k, v (Hkv, L, D) -> (T, Hq, D), by matmul and softmax."""
    tokens, num_heads, _ = q.shape
    length = k.shape[1]
    k, v = (x.repeat_interleave(num_heads // x.shape[0], 0) for x in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * scale  # (Hq, T, L)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(tokens, length, window, q.device), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


def _visible(tokens: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """(T, L) bool: which keys each of the last T positions of a sequence of L sees."""
    position = torch.arange(length - tokens, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    seen = key <= position
    return seen if window is None else seen & (key > position - window)


def prefill_attention(
    q: Tensor,
    cache: KVCache,
    block_tables: Tensor,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    window: int | None = None,
    *,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of the last query_lens[b] tokens of each sequence over its whole context in the cache.

    Args:
        q: (T, Hq, D), T = sum(query_lens), the sequences one after another; their keys and values are in the cache already.
        block_tables: (B, max_blocks) int32 on q's device.
        query_lens, context_lens: host integers; context_lens[b] >= query_lens[b] counts the new tokens too.
        softcap: scores s become softcap * tanh(s / softcap) before the softmax (Gemma 2); held whole then, (Hq, T, L).

    Returns (T, Hq, D) of q's dtype. Each sequence's pages are gathered (and dequantized) into contiguous keys and values of
    q's dtype, on which torch's fused attention runs. Raises ValueError where lengths, shapes or tables do not fit together.
    """
    if q.ndim != 3 or q.shape[2] != cache.head_dim or q.shape[1] % cache.num_kv_heads:
        raise ValueError(
            f"q is {tuple(q.shape)}, expected (T, Hq, {cache.head_dim}) with Hq a multiple of {cache.num_kv_heads}."
        )
    if len(query_lens) != len(context_lens) or block_tables.shape[0] != len(query_lens):
        raise ValueError(
            f"{len(query_lens)} query lengths, {len(context_lens)} context lengths, {block_tables.shape[0]} block tables: "
            "expected one of each a sequence."
        )
    if sum(query_lens) != q.shape[0] or any(
        not 1 <= n <= c for n, c in zip(query_lens, context_lens, strict=True)
    ):
        raise ValueError(
            f"query lengths {list(query_lens)} must sum to {q.shape[0]} tokens of q and lie in 1 .. context length "
            f"{list(context_lens)}."
        )
    if window is not None and window < 1:
        raise ValueError(f"window {window}: expected at least 1 token, or None for full attention.")
    out = torch.empty_like(q)
    start = 0
    for row, (tokens, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        part = q[start : start + tokens]
        k, v = gather_kv(cache, block_tables[row], length, q.dtype)
        if q.is_cuda and softcap is None:
            out[start : start + tokens] = _attend_fused(part, k, v, scale, window)
        else:
            out[start : start + tokens] = _attend(
                part.float(), k.float(), v.float(), scale, window, softcap
            ).to(q.dtype)
        start += tokens
    return out


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """`_attend` by torch's scaled_dot_product_attention: its flash kernel, except where a window cuts the context."""
    tokens, length = q.shape[0], k.shape[1]
    query, keys, values = q.transpose(0, 1)[None], k[None], v[None]  # (1, Hq, T, D), (1, Hkv, L, D)
    mask: Tensor | None = None
    if window is not None and window < length:
        mask = _visible(tokens, length, window, q.device)
    elif 1 < tokens < length:
        # Imported here because it brings in torch._dynamo, which takes seconds that no other path needs.
        from torch.nn.attention.bias import causal_lower_right

        # A chunk after others: torch aligns `is_causal` to the first key, this class to the last.
        mask = causal_lower_right(tokens, length)
    if mask is not None and q.shape[1] != k.shape[0]:
        # With a mask, only torch's path that holds all scores takes enable_gqa.
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[0], 1) for x in (keys, values))
    result = F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None and tokens > 1,
        scale=scale,
        enable_gqa=keys.shape[1] != query.shape[1],
    )
    return result[0].transpose(0, 1)
