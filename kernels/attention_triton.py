"""Triton kernel of paged decode attention; the contract and the torch reference are in `attention.py`.

B sequences, Hq query heads, Hkv kv heads, R = Hq / Hkv rows of a tile, D head_dim, P tokens of a page, N tokens of a tile.

How the work is shared out: the tiles of all sequences are cut into *units* of at most C tiles, so that one long sequence in a
batch does not make the others wait and the programs fill whole waves of the device. Every program derives C and its unit from
context_lens alone, so the grid depends on shapes only and a CUDA graph serves any lengths. A unit leaves its normalised output and log2-sum-exp; they are merged in the order of the units, whoever does it, so the result is the
same bits in every run. Few partials: the last unit to arrive merges. Many: a second kernel, one program a query head.
The units depend on who shares the batch, so a sequence's bits do too (fp32 partials: about 1e-7 before the final rounding).
"""

# mypy: disable-error-code="no-untyped-def"

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import DecodeWorkspace
from .fused_triton import norm_rotate
from .kv8 import KVCache
from .kv8_triton import cache_mode, cache_pointers, high_half, low_half, store_heads

INTERPRETED = bool(triton.knobs.runtime.interpret)  # no inline assembly there; plain twins give the same bits
LOG2E = 1.4426950408889634


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
def share_tiles(lens_ptr, row, batch, aim, TILE: tl.constexpr, WINDOW: tl.constexpr, EVEN: tl.constexpr):
    """Units of each sequence (one for an empty one: it writes zeros) and the most tiles of a unit.

    EVEN: `aim` units in all at most, batch <= aim. The most tiles of a unit is the least of eight candidates that keeps to it,
    from total / aim, which rounding up in each sequence may exceed, to total / (aim - batch), which cannot.
    Else: total / aim, so that only sequences longer than that are cut; batch + aim units at most.
    """
    lens = tl.load(lens_ptr + row, mask=row < batch, other=0)
    tiles = (lens + TILE - 1) // TILE
    if WINDOW > 0:
        tiles -= tl.maximum(lens - WINDOW, 0) // TILE
    if EVEN:
        step = tl.arange(0, 8)
        slots = 8 * aim - tl.where(step == 7, 8, step) * batch
        candidates = (tl.sum(tiles, 0) * 8 + slots - 1) // tl.maximum(slots, 1)
        candidates = tl.maximum(tl.where(slots > 0, candidates, tl.max(tiles, 0)), 1)
        tried = tl.maximum((tiles[None, :] + candidates[:, None] - 1) // candidates[:, None], 1)
        needed = tl.sum(tl.where(row[None, :] < batch, tried, 0), 1)
        most = tl.min(tl.where(needed <= aim, candidates, 1 << 30), 0)
    else:
        most = tl.maximum((tl.sum(tiles, 0) + aim - 1) // aim, 1)
    units = tl.where(row < batch, tl.maximum((tiles + most - 1) // most, 1), 0)
    return units, most


@triton.jit
def find_unit(
    lens_ptr, batch, aim, unit, TILE: tl.constexpr, WINDOW: tl.constexpr, EVEN: tl.constexpr, BATCH_PAD: tl.constexpr
):  # fmt: skip
    """Which tiles a unit covers: sequence, its length, index of its first unit, its number of units, tiles a unit, first tile.

    The sequence is `batch` or more where the unit is not used.
    """
    if BATCH_PAD == 1:  # scalars alone, a few hundred cycles sooner
        seq = 0
        start = 0
        length = tl.load(lens_ptr)
    else:
        row = tl.arange(0, BATCH_PAD)
        shares, most = share_tiles(lens_ptr, row, batch, aim, TILE, WINDOW, EVEN)
        seq = tl.sum((tl.cumsum(shares, 0) <= unit).to(tl.int32), 0)
        start = tl.sum(tl.where(row < seq, shares, 0), 0)
        length = tl.load(lens_ptr + tl.minimum(seq, batch - 1))
    tile0 = 0
    if WINDOW > 0:
        tile0 = tl.maximum(length - WINDOW, 0) // TILE
    tiles = (length + TILE - 1) // TILE - tile0
    if BATCH_PAD == 1:
        most = tl.maximum((tiles + aim - 1) // aim, 1)
    count = tl.maximum((tiles + most - 1) // most, 1)
    if BATCH_PAD == 1:
        seq = (unit >= count).to(tl.int32)
    return seq, length, start, count, (tiles + count - 1) // count, tile0


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


@dataclass(frozen=True)
class DecodeConfig:
    """Tuning of one launch: tokens of a tile, warps, pipeline stages, programs meant to be resident on each multiprocessor."""

    tile: int
    num_warps: int
    num_stages: int
    per_sm: int


# Tuned on an H200; see benchmarks/NOTES.md. (bits, whether query heads share kv heads) -> config
CONFIGS: dict[tuple[int, bool], DecodeConfig] = {
    (16, False): DecodeConfig(64, 4, 4, 1),
    (16, True): DecodeConfig(64, 4, 4, 1),
    (8, False): DecodeConfig(64, 2, 3, 4),
    (8, True): DecodeConfig(64, 2, 3, 4),
}
BATCH_PADS = (1, 16, 128, 1024)  # few sizes, so that few binaries serve all batches
EXTRA_WAVES = 5  # more waves than needed that may be run to fill them evenly
MERGE_ELEMENTS = 4096  # fp32 elements of partials in flight in a merging program


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # the interpreter: any number does
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _wave(config: DecodeConfig, num_kv_heads: int, device: torch.device) -> int:
    """Units of one kv head that are resident together."""
    return max(1, config.per_sm * _multiprocessors(device) // num_kv_heads)


def _share(wave: int, batch: int) -> tuple[int, int, bool]:
    """(`aim`, bound on the units, EVEN) of `share_tiles` for a batch, from shapes alone.

    A small batch is cut into whole waves of units: the fewest that equal lengths nearly fill, so that no wave runs half empty.
    Where that is one unit a sequence, only sequences far longer than the others are cut.
    """
    fewest = -(-batch // wave)
    waves = range(fewest, fewest + EXTRA_WAVES + 1)
    fill = {n: (n * wave // batch) * batch / (n * wave) for n in waves}
    target = wave * next((n for n in waves if fill[n] >= 0.9), max(waves, key=lambda n: fill[n]))
    if batch > 1 and target // batch == 1:
        aim = min(2 * wave, batch)
        return aim, batch + aim, False
    return target, target, True


def max_units(max_batch: int, num_kv_heads: int, device: torch.device | str) -> int:
    """A bound on the units of any batch up to max_batch."""
    wave = max(_wave(config, num_kv_heads, torch.device(device)) for config in CONFIGS.values())
    return 2 * max_batch + (EXTRA_WAVES + 1) * wave


@dataclass(frozen=True)
class NewTokens:
    """What `launch_decode` rotates and stores first, where q is qkv: see `rope_decode_attention`."""

    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    q_scale: Tensor | None


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
    aim, units, even = _share(_wave(config, num_kv_heads, q.device), batch)
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
        fused_merge = not even or (rows == 1 and min(aim, capacity) <= MERGE_ELEMENTS // head_dim)
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
