"""Launches paged decode attention: the kernel of `attention_decode.py` over the units of `attention_units.py`, then the merge.

B sequences, Hq query heads, Hkv kv heads, D head_dim. The units depend on who shares the batch, so a sequence's bits do too (fp32
partials: about 1e-7 before the final rounding).
"""

import torch
import triton
from torch import Tensor

from kernels.attention.decode import decode_kernel
from kernels.attention.merge import merge_kernel
from kernels.attention.operands import DecodeWorkspace, NewTokens
from kernels.attention.units import BATCH_PADS, CONFIGS, DecodeConfig, share, wave
from kernels.kv.int8_triton import cache_mode, cache_pointers
from kernels.kv.pages import KVCache

INTERPRETED = bool(triton.knobs.runtime.interpret)  # no inline assembly there; plain twins give the same bits
LOG2E = 1.4426950408889634


MERGE_ELEMENTS = 4096  # fp32 elements of partials in flight in a merging program


def launch_decode(
    q: Tensor,
    cache: KVCache,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
    workspace: DecodeWorkspace | None,
    out: Tensor | None,
    *,
    new: NewTokens | None = None,
    config: DecodeConfig | None = None,
    fused_merge: bool | None = None,
    pdl: bool = False,
) -> Tensor:
    """`decode_attention` on CUDA (or in the interpreter), arguments checked already; with `new`, `rope_decode_attention`.

    q is (B, Hq, D), with `new` (B, Hq + 2 Hkv, D). `config` and `fused_merge` are for tuning.
    """
    batch, num_heads, head_dim = q.shape
    num_kv_heads = cache.num_kv_heads
    num_heads -= 0 if new is None else 2 * num_kv_heads
    rows = num_heads // num_kv_heads
    _check_limits(q, cache, block_tables, context_lens, rows)
    config = config or CONFIGS[cache.bits, rows > 1]
    tile = min(config.tile, cache.block_size)
    least = wave(config.min_per_sm, num_kv_heads, q.device) if config.min_per_sm else 0
    aim, units, even = share(wave(config.per_sm, num_kv_heads, q.device), batch, least)
    capacity = block_tables.shape[1] * (
        cache.block_size // tile
    )  # tiles of the longest sequence that fits the table
    units = min(units, batch * max(capacity, 1))
    out = torch.empty(batch, num_heads, head_dim, dtype=q.dtype, device=q.device) if out is None else out
    if workspace is None:
        workspace = DecodeWorkspace(
            torch.empty(units, num_heads, head_dim, dtype=torch.float32, device=q.device),
            torch.empty(units, num_heads, dtype=torch.float32, device=q.device),
            torch.zeros(batch * num_kv_heads, dtype=torch.int32, device=q.device),
        )
    elif (
        workspace.lse.numel() < units * num_heads
        or workspace.partial.numel() < units * num_heads * head_dim
        or workspace.arrivals.numel() < batch * num_kv_heads
    ):
        raise ValueError(
            f"workspace has {workspace.lse.shape[0]} units and {workspace.arrivals.numel()} counters, but batch {batch} needs "
            f"{units} and {batch * num_kv_heads}: allocate it for a larger batch."
        )
    if fused_merge is None:
        # The last unit merges where that is rare, or one step of one row: else a lone merging program takes longer than a second
        # kernel, which reads with many.
        if rows == 1:
            is_few = min(aim, capacity) <= MERGE_ELEMENTS // head_dim
        else:
            is_few = min(aim // batch, capacity) <= config.max_fused_units
        fused_merge = not even or is_few
    batch_pad = next(size for size in BATCH_PADS if size >= batch)
    merge_rows = triton.next_power_of_2(rows)
    common = {
        "HEAD_DIM": head_dim, "WINDOW": window or 0, "ASM": not INTERPRETED, "TILE": tile, "EVEN": even,
        "BATCH_PAD": batch_pad, "enable_fp_fusion": True,
    }  # fmt: skip
    given = (None,) * 5 if new is None else (new.cos, new.sin, new.q_norm, new.k_norm, new.q_scale)
    decode_kernel[(num_kv_heads, units)](
        q,
        *cache_pointers(cache),
        block_tables,
        context_lens,
        out,
        workspace.partial,
        workspace.lse,
        workspace.arrivals,
        *(q if part is None else part for part in given),  # stood in for where not read
        batch,
        block_tables.stride(0),
        num_kv_heads,
        aim,
        q.stride(0),
        scale * LOG2E,
        0.0 if new is None else new.eps,
        ROWS=rows,
        ROW_PAD=max(16, merge_rows),
        PAGE=cache.block_size,
        MODE=cache_mode(cache),
        ROPE=new is not None,
        NORM=new is not None and new.q_norm is not None,
        SCALE=new is not None and new.q_scale is not None,
        FUSED_MERGE=fused_merge,
        PDL=pdl,
        MERGE_ROWS=merge_rows,
        MERGE_STEP=max(1, MERGE_ELEMENTS // (merge_rows * head_dim)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **common,
        **({"launch_pdl": True} if pdl else {}),
    )
    if not fused_merge and capacity > 1:
        merge_kernel[(num_heads, batch)](
            context_lens,
            out,
            workspace.partial,
            workspace.lse,
            batch,
            num_heads,
            aim,
            STEP=32,
            num_warps=4,
            **common,
            **({} if INTERPRETED else {"launch_pdl": True}),
        )
    return out


def _check_limits(q: Tensor, cache: KVCache, block_tables: Tensor, context_lens: Tensor, rows: int) -> None:
    """What the kernel needs beyond the contract of `decode_attention`."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"q is {q.dtype}: the decode kernel takes float16 or bfloat16.")
    if cache.bits == 16 and cache.k.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype} and the cache {cache.k.dtype}: expected one dtype.")
    if cache.head_dim not in (32, 64, 128, 256):
        raise ValueError(f"head_dim {cache.head_dim}: the decode kernel takes 32, 64, 128 or 256.")
    if q.shape[0] > BATCH_PADS[-1]:
        raise ValueError(f"batch {q.shape[0]}: the decode kernel takes at most {BATCH_PADS[-1]} sequences.")
    if rows > 64:
        raise ValueError(f"{rows} query heads share a kv head: the decode kernel takes at most 64.")
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        raise ValueError(f"q has strides {q.stride()}: the heads of a token must be contiguous.")
    if block_tables.stride(1) != 1 or not context_lens.is_contiguous():
        raise ValueError("block_tables and context_lens must be contiguous along their last axis.")
