# mypy: allow-untyped-defs, allow-incomplete-defs
"""W4A16 product of one token on the CUDA cores: one warp owns whole rows, so nothing is shared between programs.

N rows of the weight, K in features, KB = ceil(K / 128) blocks. Bound by memory: what counts is that all bytes of a
row are asked for at once and that nothing waits for a second program at the end.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.w4a16.layout import BLOCK, W4Weight
from kernels.w4a16.unpack import BF16_PLANE, check_dependent, scale_of, store_tile

_HEAD = (
    "{{ .reg .b32 t, z; {shift} lop3.b32 t, {word}, {mask}, {magic}, 0xea; prmt.b32 z, $2, 0, 0x3232; {zero} "
)
_MUL = _HEAD + "sub.rn.f16x2 t, t, z; mul.rn.f16x2 $0, t, $3; }}"
_FMA = _HEAD + "sub.rn.f16x2 t, t, z; fma.rn.f16x2 $0, t, $3, $4; }}"


def _half2(form: str, plane: int) -> str:
    """(q - z) / 16 of one plane as 64 + q / 16 - (64 + z / 16), or 4 + q / 16 - (4 + z / 16) for the upper nibble of a byte."""
    low = plane % 2 == 0
    return form.format(
        shift="shr.u32 t, $1, 8;" if plane >= 2 else "",
        word="t" if plane >= 2 else "$1",
        mask="0x000f000f" if low else "0x00f000f0",
        magic="0x54005400" if low else "0x44004400",
        zero="or.b32 z, z, 0x54005400;" if low else "shl.b32 z, z, 4; or.b32 z, z, 0x44004400;",
    )


MUL_PLANE = tl.constexpr(tuple(_half2(_MUL, plane) for plane in range(4)))
FMA_PLANE = tl.constexpr(tuple(_half2(_FMA, plane) for plane in range(4)))
SUM_HALVES = tl.constexpr(
    "{ .reg .f16 a, b; .reg .f32 c, d; mov.b32 {a, b}, $1; cvt.f32.f16 c, a; cvt.f32.f16 d, b; add.f32 $0, c, d; }"
)
FIRST_WAVE = tl.constexpr(
    1056
)  # programs that may start before the kernel ahead has ended: 132 multiprocessors x 8
PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
LOAD_FOUR = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
LOAD_SHARED_PARAM = tl.constexpr(
    "{ .reg .b32 t; ld.global.nc.b32 t, [$4]; mov.b32 $0, t; mov.b32 $1, t; mov.b32 $2, t; mov.b32 $3, t; }"
)


@triton.jit
def low_bf16(v):
    return (v << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_bf16(v):
    return (v & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _halves(v):
    """The two fp16 of an int32, as a pair of fp16 tensors."""
    return v.to(tl.int16).to(tl.float16, bitcast=True), (v >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def product(words, x, scale_zero, total, PLANE: tl.constexpr, IS_FIRST: tl.constexpr, ASM: tl.constexpr):
    """total + (q - z) / 16 * x of one plane in half2, as int32; total is not read where IS_FIRST."""
    if ASM:
        if IS_FIRST:
            return tl.inline_asm_elementwise(
                MUL_PLANE[PLANE], "=r,r,r,r", [words, scale_zero, x], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                FMA_PLANE[PLANE],
                "=r,r,r,r,r",
                [words, scale_zero, x, total],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
    else:
        z = scale_zero >> 16
        low = ((words >> (4 * PLANE)) & 15) - z
        high = ((words >> (4 * PLANE + 16)) & 15) - z
        x_low, x_high = _halves(x)
        a = low.to(tl.float32) * 0.0625 * x_low.to(tl.float32)
        b = high.to(tl.float32) * 0.0625 * x_high.to(tl.float32)
        if not IS_FIRST:
            t_low, t_high = _halves(total)
            a += t_low.to(tl.float32)
            b += t_high.to(tl.float32)
        a = a.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        b = b.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
        return a | b


@triton.jit
def sum_halves(v, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(SUM_HALVES, "=f,r", [v], dtype=tl.float32, is_pure=True, pack=1)
    else:
        low, high = _halves(v)
        return low.to(tl.float32) + high.to(tl.float32)


@triton.jit
def centred_halves(words, scale_zero, PLANE: tl.constexpr, ASM: tl.constexpr):
    """q - z of the low and the high half of int32 words, exact, as two float32 tensors; by way of bf16 where ASM."""
    if ASM:
        zero = ((scale_zero >> 16) | 0x4300) * 0x10001
        pair = tl.inline_asm_elementwise(
            BF16_PLANE[PLANE], "=r,r,r", [words, zero], dtype=tl.int32, is_pure=True, pack=1
        )
        return low_bf16(pair), high_bf16(pair)
    else:
        z = (scale_zero >> 16).to(tl.float32)
        low = (words >> (4 * PLANE)) & 15
        high = (words >> (4 * PLANE + 16)) & 15
        return low.to(tl.float32) - z, high.to(tl.float32) - z


@triton.jit
def _load_params(pointers, ASM: tl.constexpr):
    """Params for each word of a tile; four neighbouring words of a thread lie in one group, and are loaded for once."""
    if ASM:
        return tl.inline_asm_elementwise(
            LOAD_SHARED_PARAM, "=r,=r,=r,=r,l,l,l,l", [pointers], dtype=tl.int32, is_pure=True, pack=4
        )
    else:
        return tl.load(pointers)


@triton.jit
def load_x(pointers, mask, IS_MASKED: tl.constexpr, ASM: tl.constexpr):
    """x for the words of a tile, (1, C) int32. By assembly, so that each thread loads its own four words: `tl.load` would
    spread so few elements over all threads and bring them back through shared memory."""
    if ASM and not IS_MASKED:
        return tl.inline_asm_elementwise(
            LOAD_FOUR, "=r,=r,=r,=r,l,l,l,l", [pointers], dtype=tl.int32, is_pure=False, pack=4
        )
    else:
        return tl.load(pointers, mask=mask, other=0)


@triton.jit
def _ask(words, scale_zero, n0, n, b0, KB, N, GROUP: tl.constexpr, COUNT: tl.constexpr):
    """Ask for blocks b0 .. b0 + COUNT - 1 (the last in place of those beyond) of rows n in L2: 64 bytes of words a row, and their params.

    A request is one instruction of a warp for 32 places; a bulk request takes a warp some 40 cycles for each.
    """
    block = tl.minimum(b0 + tl.arange(0, COUNT), KB - 1)
    line = words + (block[None, :] * N + n[:, None]) * 16
    tl.inline_asm_elementwise(PREFETCH, "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1)
    for group in tl.static_range(128 // GROUP):
        line = scale_zero + (block * (128 // GROUP) + group) * N + n0
        tl.inline_asm_elementwise(PREFETCH, "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _accumulate(
    acc, words, x, packed, scale_zero, N,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc + the products of a tile, each element of it one word of 8 codes. acc, words (BN, C); x four planes (1, C) int32.

    packed (BN, C): scale and zero of each word where IS_PACKED; otherwise read here, from the pointers scale_zero (BN, C).
    """
    total = words
    wide = acc
    for plane in tl.static_range(4):
        if not IS_PACKED and plane * 32 % GROUP == 0:
            packed = _load_params(scale_zero + plane * 32 // GROUP * N, ASM)
        x_plane, _ = tl.broadcast(x[plane], words)
        if BF16:
            low, high = centred_halves(words, packed, plane, ASM)
            both = low * low_bf16(x_plane) + high * high_bf16(x_plane)
            wide = both if plane * 32 % GROUP == 0 else wide + both
            if (plane + 1) * 32 % GROUP == 0:
                acc += wide * scale_of(packed).to(tl.float32)
        else:
            total = product(words, x_plane, packed, total, plane, plane * 32 % GROUP == 0, ASM)
            if (plane + 1) * 32 % GROUP == 0:
                acc += sum_halves(total, ASM) * (scale_of(packed).to(tl.float32) * 16.0)
    return acc


@triton.jit
def w4_gemv(
    x, words, scale_zero, out, bias, residual,
    N, K, KB,
    GROUP: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PAIRED: tl.constexpr, BF16: tl.constexpr,
    BN: tl.constexpr, BLOCKS: tl.constexpr, SCALES_AHEAD: tl.constexpr, AHEAD: tl.constexpr,
    ASM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[n] = f(sum_k x[k] * (q[n, k] - z[n, g]) * s[n, g] + bias[n]) + residual[n], f of `store_tile`.

    x (K,) fp16 or bf16, seen as int32 pairs; words (KB, N, 16) int32 and scale_zero (KB * P, N) int32 of `w4a16_layout`;
    out, residual (N,) or (N / 2,), dtype of x; bias (N,).
    Rounding: fp16: (q - z) / 16 is exact, chains of 4 (group 128), 2 (64) or 1 (32) products with x are rounded to fp16,
    their sums accumulate in float32; finite for |x| <= 16376. bf16: float32 throughout. One rounding at the end.
    Tiles: BN rows by BLOCKS blocks (8, 16 or 32), each warp BN / warps whole rows. Registers hold 24 to 32 KB of words under way on a
    multiprocessor, less than the latency of memory at full speed asks for: the AHEAD blocks that follow are asked for in L2.
    Ragged edges: rows >= N are read from row N - 1 and not stored; blocks >= KB and k >= K are read as zero.
    """
    n0 = tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    if not EVEN_N:
        n = tl.minimum(n, N - 1)
    if AHEAD > 0 and ASM:  # the interpreter has no L2 to ask
        _ask(words, scale_zero, n0, n, 0, KB, N, GROUP, AHEAD)
    column = tl.arange(0, BLOCKS * 16)
    block = column // 16
    c = column % 16
    last = KB - 1
    word_ptr = words + n[:, None] * 16 + c[None, :]
    param_ptr = scale_zero + n[:, None]
    if (
        DEPENDENT == "late"
    ):  # nothing may wait in registers for the wait: loads after it would stand behind those before
        if AHEAD == 0 and ASM:  # noqa: SIM102 (known to the compiler: the rest is left out)
            if tl.program_id(0) < FIRST_WAVE:
                _ask(words, scale_zero, n0, n, 0, KB, N, GROUP, BLOCKS)
        tl.extra.cuda.gdc_wait()
    if EVEN_K:
        w = tl.load(word_ptr + block[None, :] * (N * 16), eviction_policy="evict_first")
    else:
        live = (block < KB)[None, :]
        w = tl.load(word_ptr + block[None, :] * (N * 16), mask=live, other=0, eviction_policy="evict_first")
    if DEPENDENT == "early":
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if DEPENDENT == "waited":
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    packed = w
    if SCALES_AHEAD:
        packed = _load_params(param_ptr + tl.minimum(block, last)[None, :] * N, ASM)
    acc = tl.zeros([BN, BLOCKS * 16], tl.float32)
    for start in range(0, KB, BLOCKS):
        if AHEAD > 0 and ASM:  # noqa: SIM102 (known to the compiler: the rest is left out)
            if start + AHEAD < KB:
                _ask(words, scale_zero, n0, n, start + AHEAD, KB, N, GROUP, BLOCKS)
        b = start + block
        pair = (b * 64 + c)[None, :]
        x0 = load_x(x + pair, pair < K // 2, not EVEN_K, ASM)
        x1 = load_x(x + pair + 16, pair + 16 < K // 2, not EVEN_K, ASM)
        x2 = load_x(x + pair + 32, pair + 32 < K // 2, not EVEN_K, ASM)
        x3 = load_x(x + pair + 48, pair + 48 < K // 2, not EVEN_K, ASM)
        group = tl.minimum(b, last) * (128 // GROUP)
        ahead = b + BLOCKS  # what the next turn multiplies is asked for now
        live = (ahead < KB)[None, :]
        following = tl.load(
            word_ptr + ahead[None, :] * (N * 16), mask=live, other=0, eviction_policy="evict_first"
        )
        if SCALES_AHEAD:
            following_packed = _load_params(param_ptr + tl.minimum(ahead, last)[None, :] * N, ASM)
        group_ptr = scale_zero + group[None, :] * N + n[:, None]
        acc = _accumulate(acc, w, (x0, x1, x2, x3), packed, group_ptr, N, GROUP, SCALES_AHEAD, BF16, ASM)
        w = following
        if SCALES_AHEAD:
            packed = following_packed
    if DEPENDENT == "late":
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.sum(acc, 1)[None, :]
    store_tile(total, out, bias, residual, tl.arange(0, 1), n0, 1, N, BN, HAS_BIAS, HAS_RESIDUAL, PAIRED)


@dataclass(frozen=True)
class GemvTile:
    """How `w4_gemv` cuts a product: BN rows and BLOCKS blocks of 128 k at a time.

    `scales_ahead` (groups of 128): scales are loaded one turn ahead of their use, as words always are; more registers.
    `ahead`: blocks that a program asks for in L2 before it loads them, 0 or a power of two, at least `blocks`.
    `dependent` as in `GemmTile`.
    """

    bn: int
    blocks: int
    warps: int
    scales_ahead: bool = False
    dependent: str = "early"
    ahead: int = 0

    def __post_init__(self) -> None:
        check_dependent(self.dependent)
        if self.ahead and (self.ahead & (self.ahead - 1) or self.ahead < self.blocks):
            raise ValueError(
                f"ahead is {self.ahead}: 0 or a power of two of at least the {self.blocks} blocks of a turn."
            )


def launch_gemv(
    x: Tensor,
    weight: W4Weight,
    tile: GemvTile,
    out: Tensor,
    residual: Tensor | None = None,
    is_dependent: bool = False,
) -> None:
    """Write the product of x (1, K) and `weight` to out (1, out_features). Operands as `w4a16_linear` has checked them."""
    dependent = tile.dependent if is_dependent else "never"
    options = {"num_warps": tile.warps}
    if dependent != "never":
        options["launch_pdl"] = True
    w4_gemv[(-(-weight.rows // tile.bn),)](
        x.view(torch.int32), weight.words.view(torch.int32), weight.params, out, weight.bias, residual,
        weight.rows, weight.in_features, weight.blocks,
        GROUP=weight.group_size,
        EVEN_N=weight.rows % tile.bn == 0, EVEN_K=weight.in_features % (tile.blocks * BLOCK) == 0,
        HAS_BIAS=weight.bias is not None, HAS_RESIDUAL=residual is not None, PAIRED=weight.is_paired,
        BF16=x.dtype == torch.bfloat16, BN=tile.bn, BLOCKS=tile.blocks, SCALES_AHEAD=tile.scales_ahead and weight.group_size == BLOCK,
        AHEAD=tile.ahead,
        ASM=not triton.knobs.runtime.interpret, DEPENDENT=dependent, **options,
    )  # fmt: skip
