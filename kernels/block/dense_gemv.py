"""One token through a float weight, y = W x + b, at the speed of the memory: where cuBLAS reaches two thirds to nine tenths of it.

N rows of the weight, K in features, W = K / 2 words: two neighbouring values as one int32. Knows nothing of layers. More than
one token, and what `takes` refuses, are `F.linear`'s.
"""

# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.w4a16.gemv import FIRST_WAVE, high_bf16, low_bf16
from kernels.w4a16.unpack import check_dependent

DTYPES = (torch.float16, torch.bfloat16)
MULTIPROCESSORS = 132  # of the GPU that the tiles are meant for; another number costs speed alone
TWO_HALVES = tl.constexpr("{ .reg .f16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }")
ASK_ROWS = tl.constexpr(  # operands: address of the first row, bytes from row to row, bytes to ask for, rows; thread i asks for row i
    "{ .reg .pred p; .reg .b32 t; .reg .b64 a; mov.u32 t, %tid.x; setp.lt.u32 p, t, $4; mad.wide.u32 a, t, $2, $1;"
    " @p cp.async.bulk.prefetch.L2.global [a], $3; mov.b32 $0, 0; }"
)


@triton.jit
def _floats(words, BF16: tl.constexpr, ASM: tl.constexpr):
    """The two 16-bit values of int32 words as two float32 tensors, exact."""
    if BF16:
        return low_bf16(words), high_bf16(words)
    elif ASM:
        return tl.inline_asm_elementwise(
            TWO_HALVES, "=f,=f,r", [words], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        low = words.to(tl.int16).to(tl.float16, bitcast=True)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _ask_rows(pointer, stride, ask, count):
    """Ask for the first `ask` bytes of `count` rows, 32 at most, in L2. Waits for nothing."""
    tl.inline_asm_elementwise(
        ASK_ROWS, "=r,l,r,r,r", [pointer.to(tl.int64), stride, ask, count], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "quads", "ask"])  # one binary serves all shapes
def dense_gemv_kernel(
    x, weight, bias, residual, out,
    rows, quads, ask,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr, BF16: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, ASKS: tl.constexpr, ASM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[n] = sum_k w[n, k] x[k] + bias[n] + residual[n], or silu(gate[n]) * up[n] + residual[n] of rows n and n + `rows` (GATED).

    x (K,) and weight (N, K) row-major, fp16 or bf16, seen as int32 words, K = 8 * quads; bias (N,) of their dtype, residual
    (`rows`,); out (`rows`,) any float.
    Rounding: products and sums float32 in one fixed order, one rounding at the end; gate and up are rounded to the dtype of x
    before and after silu, as torch does.
    Tiles: BN rows (pairs of rows where GATED) by BW words a turn, the words of the next turn asked for in
    the one before, though ptxas issues those loads after its arithmetic.
    DEPENDENT as in `GemmTile`; ASKS: before all else a program asks for the first `ask` bytes of each of its rows in L2.
    Ragged edges: rows past the last are read from the last and not stored; k >= K are read as zero.
    """
    words = quads * 4  # said so that the compiler knows the mask of four neighbours to be one
    n0 = tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    ok = n < rows
    column = tl.arange(0, BW)[None, :]
    lower = rows.to(tl.int64) * words  # from gate to up
    tile = weight + tl.minimum(n, rows - 1).to(tl.int64)[:, None] * words + column
    if ASKS and ASM:  # the interpreter has no L2 to ask
        count = tl.minimum(rows - n0, BN)
        line = weight + n0.to(tl.int64) * words
        _ask_rows(line, words * 4, ask, count)
        if GATED:
            _ask_rows(line + lower, words * 4, ask, count)
    if DEPENDENT == "late":
        tl.extra.cuda.gdc_wait()
    live = column < words
    if EVEN_K:
        w = tl.load(tile, eviction_policy="evict_first")
    else:
        w = tl.load(tile, mask=live, other=0, eviction_policy="evict_first")
    u = w
    if GATED:
        if EVEN_K:
            u = tl.load(tile + lower, eviction_policy="evict_first")
        else:
            u = tl.load(tile + lower, mask=live, other=0, eviction_policy="evict_first")
    if DEPENDENT == "early":
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if DEPENDENT == "waited":
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([BN, BW], tl.float32)
    total_up = tl.zeros([BN, BW], tl.float32)
    for start in range(0, words, BW):
        if EVEN_K:
            x_words = tl.load(x + start + column)
            ahead = tl.full([1, BW], 1, tl.int1) & (start + BW < words)  # one for the turn
        else:
            x_words = tl.load(x + start + column, mask=start + column < words, other=0)
            ahead = start + BW + column < words
        x_low, x_high = _floats(x_words, BF16, ASM)
        following = tl.load(tile + start + BW, mask=ahead, other=0, eviction_policy="evict_first")
        low, high = _floats(w, BF16, ASM)
        total = total + low * x_low + high * x_high
        w = following
        if GATED:
            following = tl.load(tile + lower + start + BW, mask=ahead, other=0, eviction_policy="evict_first")
            low, high = _floats(u, BF16, ASM)
            total_up = total_up + low * x_low + high * x_high
            u = following
    if DEPENDENT == "late":
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.sum(total, 1)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=ok, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(total_up, 1)
        if HAS_BIAS:
            up += tl.load(bias + rows + n, mask=ok, other=0.0).to(tl.float32)
        narrow = tl.bfloat16 if BF16 else tl.float16
        gate = y.to(narrow).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(narrow).to(tl.float32)
        y = silu * up.to(narrow).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=ok)


@dataclass(frozen=True)
class DenseTile:
    """How `dense_gemv_kernel` cuts a product: `bn` rows, gate's and up's counted, by `bk` k a turn, in `warps` warps.

    A turn is 256 k a warp or a multiple: then each thread loads 16 bytes of each row and the same columns of x, which need not
    pass through shared memory to meet the weights.

    dependent: as in `GemmTile`; with all products started "waited" int4 decoding of one sequence made 566 tok/s, "early" 519.
    ask_mib: MiB of weights, over all programs that run at once, that they ask for in L2 at their start, by one request a row: it needs
    no registers, and the memory is idle while the kernel ahead is a norm or attention.
    """

    bn: int
    bk: int
    warps: int
    dependent: str = "waited"
    ask_mib: int = 0

    def __post_init__(self) -> None:
        check_dependent(self.dependent)
        if not 2 <= self.bn <= 32 or self.bn & (self.bn - 1):
            raise ValueError(f"a tile has {self.bn} rows; expected a power of two from 2 to 32.")
        if self.bk & (self.bk - 1) or self.bk % (256 * self.warps):
            raise ValueError(
                f"a turn is {self.bk} k in {self.warps} warps; expected a power of two, 256 a warp or more."
            )


def default_tile(rows: int) -> DenseTile:
    """The tile for a weight of so many rows.

    4.2 TB/s at a latency of 1 us under load want 4.2 MB under way, 32 KB a multiprocessor. A program of 8 rows by 1,024 k has 16 KB under
    way: of 4,096 rows 3.9 programs a multiprocessor, all at once. On an H200 the products and norms of a 7B layer, each behind the
    other, take 102.4 us with it, 109.5 us with 4 rows and 102.7 with 2 by 2,048 k (benchmarks/gemv.json), which of few rows keep more
    programs busy.
    """
    return DenseTile(8, 1024, 4) if rows >= 2 * 8 * MULTIPROCESSORS else DenseTile(2, 2048, 8)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes x (1, K) times weight (N, K): on a GPU, both fp16 or both bf16, row-major, starting at a multiple
    of 16 bytes, K a multiple of 8. Otherwise `F.linear` does."""
    return (
        x.is_cuda
        and x.device == weight.device
        and x.ndim == weight.ndim == 2
        and x.shape[0] == 1
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and weight.shape[1] % 8 == 0
        and weight.numel() > 0
        and x.stride(1) == 1
        and weight.is_contiguous()
        and (x.data_ptr() | weight.data_ptr()) % 16 == 0
    )


def dense_gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """f(x weight^T + bias) + residual, (1, N) of `out_dtype` (None: that of x); gated: f = silu(gate) * up, (1, N / 2), gate's rows
    first.

    x (1, K) and weight (N, K) of one float dtype, bias (N,) and residual (as the result) of that dtype. Starts before the kernel
    ahead of it has ended; the same inputs give the same bits. What `takes` refuses goes through `F.linear`, which rounds the product
    before the rest, and on the CPU through the torch reference. Raises ValueError where a shape, dtype or device does not fit.
    """
    _check(x, weight, bias, gated, residual)
    if takes(x, weight):
        return launch_dense_gemv(x, weight, bias, gated, out_dtype or x.dtype, residual=residual)
    if not x.is_cuda:
        return dense_gemv_reference(x, weight, bias, gated=gated, residual=residual, out_dtype=out_dtype)
    return _epilogue(F.linear(x, weight, bias), x.dtype, gated, residual).to(out_dtype or x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, residual: Tensor | None) -> None:
    if x.ndim != 2 or x.shape[0] != 1 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}: expected (1, K) and (N, K).")
    if weight.dtype != x.dtype or weight.device != x.device:
        found = f"x is {x.dtype} on {x.device} and weight {weight.dtype} on {weight.device}"
        raise ValueError(f"{found}: expected one dtype and device.")
    if gated and weight.shape[0] % 2:
        raise ValueError(
            f"a gated weight has {weight.shape[0]} rows: expected gate's and up's, as many of each."
        )
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    for name, given, shape in (("bias", bias, (weight.shape[0],)), ("residual", residual, (1, width))):
        if given is not None and (tuple(given.shape), given.dtype, given.device) != (
            shape,
            x.dtype,
            x.device,
        ):
            raise ValueError(
                f"{name} is {tuple(given.shape)} {given.dtype} on {given.device}, expected {shape} {x.dtype} on {x.device}."
            )


def launch_dense_gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gated: bool,
    out_dtype: torch.dtype,
    pdl: bool = True,
    *,
    residual: Tensor | None = None,
    tile: DenseTile | None = None,
) -> Tensor:
    """The kernel on operands that have been checked; for `dense_gemv`, for timing, and for the interpreter (pdl False there).

    tile: None for that of the shape. Raises ValueError where K is no multiple of 8.
    """
    if weight.shape[1] % 8:
        raise ValueError(f"weight is {tuple(weight.shape)}: the kernel takes K in multiples of 8.")
    tile = default_tile(weight.shape[0]) if tile is None else tile
    rows = weight.shape[0] // 2 if gated else weight.shape[0]
    bn = tile.bn // 2 if gated else tile.bn
    programs = -(-rows // bn)
    out = torch.empty(1, rows, dtype=out_dtype, device=x.device)
    dependent = tile.dependent if pdl else "never"
    asked = min(programs, FIRST_WAVE.value) * tile.bn  # rows of the programs that run at once
    options = {"num_warps": tile.warps, "enable_fp_fusion": True}
    dense_gemv_kernel[(programs,)](
        x.reshape(-1).view(torch.int32), weight.view(torch.int32), bias, None if residual is None else residual.contiguous(), out,
        rows, weight.shape[1] // 8, min(2 * weight.shape[1], (tile.ask_mib << 20) // asked // 16 * 16),
        GATED=gated, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        EVEN_K=weight.shape[1] % tile.bk == 0, BF16=x.dtype == torch.bfloat16,
        BN=bn, BW=tile.bk // 2, ASKS=tile.ask_mib > 0, ASM=not triton.knobs.runtime.interpret, DEPENDENT=dependent,
        **options | ({"launch_pdl": True} if dependent != "never" else {}),
    )  # fmt: skip
    return out


def dense_gemv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The same in torch, from float32 products."""
    wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return _epilogue(wide, x.dtype, gated, residual).to(out_dtype or x.dtype)


def _epilogue(product: Tensor, dtype: torch.dtype, gated: bool, residual: Tensor | None) -> Tensor:
    """f(product (1, N)) + residual, with the roundings to `dtype` that a gated product has; float32."""
    product = product.float()
    if gated:
        gate, up = product.to(dtype).float().chunk(2, -1)
        product = F.silu(gate).to(dtype).float() * up.to(dtype).float()
    return product if residual is None else product + residual.float()
