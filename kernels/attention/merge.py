"""Joins what the units of a sequence have left, in the order of the units, whoever does it: the same bits in every run.

A unit leaves its normalised output and its log2-sum-exp. Few partials: the last unit to arrive merges inside `decode_kernel`.
Many: a second kernel, one program a query head.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from kernels.attention.units import find_unit, share_tiles


@triton.jit
def merge_units(
    partial_ptr,
    lse_ptr,
    out_ptr,
    start,
    count,
    num_heads,
    head0,
    out_row,
    ROWS: tl.constexpr,
    ROW_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STEP: tl.constexpr,
):
    """out[row] = sum_u 2^(lse_u - max) o_u / sum_u 2^(lse_u - max), STEP units at a time in their order."""
    step = tl.arange(0, STEP)
    rows = tl.arange(0, ROW_PAD)
    dims = tl.arange(0, HEAD_DIM)
    top = tl.full([ROW_PAD], float("-inf"), tl.float32)
    total = tl.zeros([ROW_PAD], tl.float32)
    acc = tl.zeros([ROW_PAD, HEAD_DIM], tl.float32)
    for begin in range(0, count, STEP):
        ok = (begin + step < count)[:, None] & (rows < ROWS)[None, :]
        index = (start + begin + step)[:, None] * num_heads + head0 + rows[None, :]  # (STEP, ROW_PAD)
        lse = tl.load(lse_ptr + index, mask=ok, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            partial_ptr + index[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=ok[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(lse, 0))
        keep = tl.exp2(top - new_top)
        weight = tl.exp2(lse - new_top[None, :])
        total = total * keep + tl.sum(weight, 0)
        acc = acc * keep[:, None] + tl.sum(part * weight[:, :, None], 0)
        top = new_top
    result = acc / total[:, None]
    tl.store(
        out_ptr + out_row * HEAD_DIM + rows[:, None] * HEAD_DIM + dims[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=(rows < ROWS)[:, None],
    )


@triton.jit(do_not_specialize=["batch", "aim"])
def merge_kernel(
    lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    batch,
    num_heads,
    aim,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    ASM: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
    BATCH_PAD: tl.constexpr,
    STEP: tl.constexpr,
):
    """One query head of one sequence: merge its units. Sequences of one unit are written already.

    Launched as a dependent of `decode_kernel`: it finds its units while that drains. Every program waits, so that nothing later
    can overtake the kernel before.
    """
    head = tl.program_id(0)
    seq = tl.program_id(1)
    if BATCH_PAD == 1:
        _seq, _length, start, count, _each, _tile0 = find_unit(
            lens_ptr, batch, aim, 0, TILE, WINDOW, EVEN, BATCH_PAD
        )
    else:
        row = tl.arange(0, BATCH_PAD)
        units, _most = share_tiles(lens_ptr, row, batch, aim, TILE, WINDOW, EVEN)
        start = tl.sum(tl.where(row < seq, units, 0), 0)
        count = tl.sum(tl.where(row == seq, units, 0), 0)
    if ASM:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if count > 1:
        merge_units(
            partial_ptr,
            lse_ptr,
            out_ptr,
            start,
            count,
            num_heads,
            head,
            seq.to(tl.int64) * num_heads + head,
            1,
            1,
            HEAD_DIM,
            STEP,
        )
