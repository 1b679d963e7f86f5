"""Triton kernel of paged decode attention for one unit of one kv head; contract and torch reference are in `attention.py`.

B sequences, Hq query heads, Hkv kv heads, R = Hq / Hkv rows of a tile, D head_dim, P tokens of a page, N tokens of a tile.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from kernels.attention.merge import merge_units
from kernels.attention.units import find_unit
from kernels.block.fused_triton import norm_rotate
from kernels.kv.int8_triton import high_half, low_half, store_heads


@triton.jit
def low_codes(words, ASM: tl.constexpr):
    """int16 words -> fp16 u8 - 128 of the low bytes. 0x6400 | u8 is 1024 + u8 in fp16, and the subtraction is exact."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, c; mov.b32 c, 0x64806480; lop3.b32 t, $1, 0x00ff00ff, 0x64006400, 0xea; sub.rn.f16x2 $0, t, c; }",
            "=r,r",
            [words],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return ((words & 0xFF) - 128).to(tl.float16)


@triton.jit
def high_codes(words, ASM: tl.constexpr):
    """int16 words -> fp16 u8 - 128 of the high bytes."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, c; mov.b32 c, 0x64806480; prmt.b32 t, $1, 0x64646464, 0x4341; sub.rn.f16x2 $0, t, c; }",
            "=r,r",
            [words],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return (((words >> 8) & 0xFF) - 128).to(tl.float16)


@triton.jit
def prefetch_lines(pointers, ASM: tl.constexpr):
    """Ask for the 128-byte lines at these pointers in L2. Reads nothing, so it may precede the kernel that writes them."""
    if ASM:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["batch", "aim", "max_blocks"])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    params_ptr,
    static_ptr,
    tables_ptr,
    lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    arrivals_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_scale_ptr,
    batch,
    max_blocks,
    num_kv_heads,
    aim,
    q_stride,
    score_scale,
    eps,
    ROWS: tl.constexpr,
    ROW_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    MODE: tl.constexpr,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    FUSED_MERGE: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
    BATCH_PAD: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_STEP: tl.constexpr,
):
    """One unit of one kv head: online softmax over its tiles, for the R query heads that share them.

    score = score_scale * q . k (score_scale holds log2 e, so exp is exp2). int8: with codes c = u8 - 128 exact in fp16,
    q . k = k_scale * (q . c) + k_zero * sum(q) and p . v = (p * v_scale) . c + sum(p * v_zero): scales stay outside the products.
    Both products are taken in halves of the head, channels below D / 2 and those above, as int8 words hold them.
    q (B, Hq, D) fp16/bf16, row stride q_stride; pages and params as in `kv8`; tables (B, max_blocks) int32; lens (B,) int32.
    ROPE: q_ptr holds qkv rows instead (B, (Hq + 2 Hkv) * D), cos and sin (B, D / 2) fp32; q is normed and rotated here, and the
    unit that ends a sequence first stores its new key and value, as `rope_store` does.
    Products have 16-bit operands and fp32 accumulators (int8 pages: fp16 whatever q is); p is rounded to 16 bits.
    ROW_PAD >= 16 rows (tensor core), those from ROWS on are zero; TILE divides PAGE; keys past the length weigh nothing, whatever
    a stale page holds there (NaN too).
    PDL: lens, tables and all but the newest keys and values are not written by the kernel before, so they are looked up and
    asked for in L2 while it drains.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = HEAD_DIM if MODE == 0 else HALF  # elements of a token in a page
    head = tl.program_id(0)
    unit = tl.program_id(1)
    seq, length, start, count, each, tile0 = find_unit(
        lens_ptr, batch, aim, unit, TILE, WINDOW, EVEN, BATCH_PAD
    )
    if seq >= batch:
        return
    num_heads = num_kv_heads * ROWS
    rows = tl.arange(0, ROW_PAD)
    tokens = tl.arange(0, TILE)
    dims = tl.arange(0, HALF)
    row_ok = (rows < ROWS)[:, None]
    out_row = seq.to(tl.int64) * num_heads + head * ROWS
    out_rows = out_ptr + (out_row + rows)[:, None] * HEAD_DIM + dims[None, :]
    if length == 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        nothing = tl.zeros([ROW_PAD, HALF], out_ptr.dtype.element_ty)
        tl.store(out_rows, nothing, mask=row_ok)
        tl.store(out_rows + HALF, nothing, mask=row_ok)
        return
    # No unit is empty and every tile holds a visible key, so maxima and sums below are finite and positive.
    begin = tile0 + (unit - start) * each
    end = tl.minimum(begin + each, (length + TILE - 1) // TILE)
    table = tables_ptr + seq.to(tl.int64) * max_blocks
    page = tl.load(table + begin * TILE // PAGE).to(
        tl.int64
    )  # read one tile ahead: the address of a tile waits for it
    if PDL:
        second_tile = tl.minimum(begin + 1, end - 1)
        second_page = tl.load(table + second_tile * TILE // PAGE).to(tl.int64)
        line = tl.arange(0, TILE * WIDTH // 64) * 64  # 128-byte lines of a tile
        row0 = ((page * num_kv_heads + head) * PAGE + begin * TILE % PAGE) * WIDTH
        row1 = ((second_page * num_kv_heads + head) * PAGE + second_tile * TILE % PAGE) * WIDTH
        prefetch_lines(k_ptr + row0 + line, ASM)
        prefetch_lines(v_ptr + row0 + line, ASM)
        prefetch_lines(k_ptr + row1 + line, ASM)
        prefetch_lines(v_ptr + row1 + line, ASM)
        tl.extra.cuda.gdc_wait()
    if ASM:
        tl.extra.cuda.gdc_launch_dependents()  # for the merging kernel too

    q_row = q_ptr + seq.to(tl.int64) * q_stride
    q_rows = q_row + (head * ROWS + rows)[:, None] * HEAD_DIM + dims[None, :]
    q_low = tl.load(q_rows, mask=row_ok, other=0.0)
    q_high = tl.load(q_rows + HALF, mask=row_ok, other=0.0)
    if ROPE:
        cos = tl.load(cos_ptr + seq * HALF + dims)[None, :]
        sin = tl.load(sin_ptr + seq * HALF + dims)[None, :]
        q_low, q_high = norm_rotate(q_low, q_high, cos, sin, q_norm_ptr, eps, NORM, HALF)
        if SCALE:
            factor = tl.load(q_scale_ptr + seq).to(q_low.dtype).to(tl.float32)
            q_low = (q_low.to(tl.float32) * factor).to(q_low.dtype)
            q_high = (q_high.to(tl.float32) * factor).to(q_high.dtype)
        if unit - start == count - 1:
            one = head + tl.arange(0, 1)
            k_new = q_row + (num_heads + one)[:, None] * HEAD_DIM + dims[None, :]
            v_new = k_new + num_kv_heads * HEAD_DIM
            k_low, k_high = norm_rotate(
                tl.load(k_new), tl.load(k_new + HALF), cos, sin, k_norm_ptr, eps, NORM, HALF
            )
            slot = tl.load(table + (length - 1) // PAGE).to(tl.int64) * PAGE + (length - 1) % PAGE
            store_heads(
                k_low.to(tl.float32), k_high.to(tl.float32), k_ptr, params_ptr, static_ptr, slot, one,
                num_kv_heads, 0, HALF, PAGE, MODE,
            )  # fmt: skip
            store_heads(
                tl.load(v_new).to(tl.float32), tl.load(v_new + HALF).to(tl.float32), v_ptr, params_ptr, static_ptr, slot,
                one, num_kv_heads, 1, HALF, PAGE, MODE,
            )  # fmt: skip
            tl.debug_barrier()  # the stores are seen by all threads of the program before any reads the tile
    first_seen = 0
    if WINDOW > 0:
        first_seen = length - WINDOW
    top = tl.full([ROW_PAD], float("-inf"), tl.float32)
    # Sums over keys stay apart for each column of a tile until the end: a sum across warps costs two barriers.
    weights = tl.zeros([ROW_PAD, TILE], tl.float32)
    zeros = tl.zeros([ROW_PAD, TILE], tl.float32)  # p * v_zero
    acc_low = tl.zeros([ROW_PAD, HALF], tl.float32)
    acc_high = tl.zeros([ROW_PAD, HALF], tl.float32)
    if MODE > 0:
        q_low = q_low.to(tl.float16)
        q_high = q_high.to(tl.float16)
        q_sum = (tl.sum(q_low.to(tl.float32), 1) + tl.sum(q_high.to(tl.float32), 1)) * score_scale
    if MODE == 1:
        pair_ptr = params_ptr + (page * num_kv_heads + head) * (2 * PAGE) + begin * TILE % PAGE + tokens
        k_next = tl.load(pair_ptr)
        v_next = tl.load(pair_ptr + PAGE)
    elif MODE == 2:
        k_scale = tl.load(static_ptr + head) * score_scale
        k_zero = tl.load(static_ptr + num_kv_heads + head)
    for tile in range(begin, end):
        offset = ((page * num_kv_heads + head) * PAGE + tile * TILE % PAGE) * WIDTH
        where = offset + tokens[:, None] * WIDTH + dims[None, :]
        following = tl.minimum(tile + 1, end - 1)
        page = tl.load(table + following * TILE // PAGE).to(tl.int64)
        position = tile * TILE + tokens
        ok = position < length
        if MODE == 0:
            k_low = tl.trans(tl.load(k_ptr + where, eviction_policy="evict_first"))
            k_high = tl.trans(tl.load(k_ptr + where + HALF, eviction_policy="evict_first"))
            v_low = tl.load(v_ptr + where, mask=ok[:, None], other=0.0, eviction_policy="evict_first")
            v_high = tl.load(v_ptr + where + HALF, mask=ok[:, None], other=0.0, eviction_policy="evict_first")
        else:
            k_words = tl.trans(tl.load(k_ptr + where, eviction_policy="evict_first"))
            v_words = tl.load(v_ptr + where, eviction_policy="evict_first")
            k_low = low_codes(k_words, ASM)
            k_high = high_codes(k_words, ASM)
            v_low = low_codes(v_words, ASM)
            v_high = high_codes(v_words, ASM)
        score = tl.dot(q_low, k_low)
        score = tl.dot(q_high, k_high, score)
        if MODE == 0:
            score = score * score_scale
        elif MODE == 1:
            # One tile ahead, since only operands of a product are prefetched by the compiler.
            k_pair = k_next
            v_pair = v_next
            pair_ptr = (
                params_ptr + (page * num_kv_heads + head) * (2 * PAGE) + following * TILE % PAGE + tokens
            )
            k_next = tl.load(pair_ptr)
            v_next = tl.load(pair_ptr + PAGE)
            score = (
                score * (low_half(k_pair) * score_scale)[None, :]
                + q_sum[:, None] * high_half(k_pair)[None, :]
            )
        else:
            score = score * k_scale + (q_sum * k_zero)[:, None]
        if WINDOW > 0:
            ok = ok & (position >= first_seen)
        score = tl.where(ok[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        keep = tl.exp2(top - new_top)
        p = tl.exp2(score - new_top[:, None])
        weights = weights * keep[:, None] + p
        if MODE == 1:
            v_scale = tl.where(ok, low_half(v_pair), 0.0)
            v_zero = tl.where(ok, high_half(v_pair), 0.0)
            zeros = zeros * keep[:, None] + p * v_zero[None, :]
            p = p * v_scale[None, :]
        p = p.to(v_low.dtype)
        acc_low = tl.dot(p, v_low, acc_low * keep[:, None])
        acc_high = tl.dot(p, v_high, acc_high * keep[:, None])
        top = new_top
    total = tl.sum(weights, 1)
    if MODE == 1:
        added = tl.sum(zeros, 1)[:, None]
        acc_low = acc_low + added
        acc_high = acc_high + added
    elif MODE == 2:
        v_scale = tl.load(static_ptr + 2 * num_kv_heads + head)
        added = (total * tl.load(static_ptr + 3 * num_kv_heads + head))[:, None]
        acc_low = acc_low * v_scale + added
        acc_high = acc_high * v_scale + added
    acc_low = acc_low / total[:, None]
    acc_high = acc_high / total[:, None]

    if count == 1:
        tl.store(out_rows, acc_low.to(out_ptr.dtype.element_ty), mask=row_ok)
        tl.store(out_rows + HALF, acc_high.to(out_ptr.dtype.element_ty), mask=row_ok)
    else:
        index = unit * num_heads + head * ROWS + rows
        partial_rows = partial_ptr + index[:, None] * HEAD_DIM + dims[None, :]
        tl.store(partial_rows, acc_low, mask=row_ok)
        tl.store(partial_rows + HALF, acc_high, mask=row_ok)
        tl.store(lse_ptr + index, tl.log2(total) + top, mask=rows < ROWS)
        if FUSED_MERGE:
            tl.debug_barrier()  # every thread's stores are made before the one thread counts this unit
            counter = arrivals_ptr + seq * num_kv_heads + head
            arrived = tl.atomic_add(counter, 1, sem="acq_rel")
            if arrived == count - 1:
                tl.store(counter, 0)
                merge_units(
                    partial_ptr,
                    lse_ptr,
                    out_ptr,
                    start,
                    count,
                    num_heads,
                    head * ROWS,
                    out_row,
                    ROWS,
                    MERGE_ROWS,
                    HEAD_DIM,
                    MERGE_STEP,
                )
