# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# ruff: noqa: RUF005 (kernels add tuples; they cannot unpack one into another)
"""W4A16 product of a few tokens: one piece of one tile for each program, the weights as left operand of `mma`.

M tokens (at most 16), N rows of the weight, K in features, KB = ceil(K / 128) blocks, P groups in a block.
A tile of BN rows is cut along K into SPLIT equal pieces, one program each, so that a program fills its pipeline once and
ends. Pieces are summed in float32 in the order of k by whichever program arrives last: the same bits in every run.
As a dependent launch a program asks for its weights in L2 while the kernel ahead drains, and lets the kernel behind it
start only after its own wait, so that two kernels share the card at most and each is dealt out evenly.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.w4a16.layout import BLOCK, W4Weight
from kernels.w4a16.schedule import MAX_TILES, PARTIAL_FLOATS, Workspace
from kernels.w4a16.unpack import ask_ahead, centred, check_dependent, scale_of, store_tile, zero_of

MAX_TOKENS = 32


@triton.jit
def _dot(w, x, acc, ASM: tl.constexpr):
    if not ASM:  # the interpreter has no bf16 dot
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(w, x, acc)


@triton.jit
def _slice(x_ptr, m, k, M, left, EVEN_K: tl.constexpr):
    """One slice of x (32, 8): what a plane of a block multiplies, for 8 tokens."""
    live = m[None, :] < M
    if not EVEN_K:
        live = live & (k < left)
    return tl.load(x_ptr, mask=live, other=0.0, eviction_policy="evict_last")


@triton.jit(do_not_specialize=["M", "run"])
def w4_split(
    x, words, scale_zero, out, bias, residual, partial, arrived,
    M, N, K, KB, stride_x, run,
    GROUP: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PAIRED: tl.constexpr,
    EIGHTS: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr,
    ASM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[m, n] = f(sum_k x[m, k] * (q[n, k] - z[n, g]) * s[n, g] + bias[n]) + residual[m, n], f of `store_tile`.

    x (M, K) fp16 or bf16, rows `stride_x` apart; words (KB, N, 32) int16 and scale_zero (KB * P, N) int32 of
    `w4a16_layout`; out, residual (M, N) or (M, N / 2) row-major, dtype of x; bias (N,); partial: float32 workspace of one
    tile (8 EIGHTS, BN) for each program; arrived (T,) int32, zero before and after.
    Rounding: q - z is exact in the product, sums of a group are float32, s multiplies them; one rounding at the end.
    Tiles: 8 EIGHTS >= M tokens by BN rows, a power of two, at least 32 for each warp (with fewer, scales would be loaded
    again in the loop, unpipelined); program (tile, piece) takes blocks piece * run .. of SPLIT pieces, none of them empty.
    Ragged edges: rows >= N are read from row N - 1 and not stored; tokens >= M and k >= K are read as zero.
    """
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    tile = tl.program_id(0)
    piece = tl.program_id(1)
    n0 = tile * BN
    b0 = piece * run
    b1 = tl.minimum(b0 + run, KB)
    if DEPENDENT == "early":
        tl.extra.cuda.gdc_launch_dependents()
    if DEPENDENT != "never":
        if EVEN_N:
            ask_ahead(words, scale_zero, n0, b0, b1, N, GROUP, 32, BN, AHEAD)
        tl.extra.cuda.gdc_wait()
        if DEPENDENT == "waited":
            tl.extra.cuda.gdc_launch_dependents()
    n = n0 + tl.arange(0, BN)
    if not EVEN_N:
        n = tl.minimum(n, N - 1)
    c = tl.arange(0, 32)
    m = tl.arange(0, 8)
    k = c[:, None]
    word_ptr = words + (b0 * N + n[:, None]) * 32 + c[None, :]
    param_ptr = scale_zero + b0 * (128 // GROUP) * N + n
    x_ptr = x + b0 * 128 + m[None, :] * stride_x + k
    sums = ()
    for _eighth in tl.static_range(EIGHTS):
        sums = sums + (tl.zeros([BN, 8], tl.float32),)
    for b in range(b0, b1):
        w = tl.load(word_ptr, eviction_policy="evict_first")
        parts = sums
        for plane in tl.static_range(4):
            if plane * 32 % GROUP == 0:
                packed = tl.load(param_ptr + plane * 32 // GROUP * N, eviction_policy="evict_first")
            zero, _ = tl.broadcast(zero_of(packed, plane, BF16)[:, None], w)
            codes = centred(w, zero, plane, BF16, ASM)
            added = ()
            for eighth in tl.static_range(EIGHTS):
                tokens = _slice(
                    x_ptr + eighth * 8 * stride_x + plane * 32,
                    m + eighth * 8,
                    k + plane * 32,
                    M,
                    K - b * 128,
                    EVEN_K,
                )
                start = tl.zeros([BN, 8], tl.float32) if plane * 32 % GROUP == 0 else parts[eighth]
                added = added + (_dot(codes, tokens, start, ASM),)
            parts = added
            if (plane + 1) * 32 % GROUP == 0:
                scale = scale_of(packed).to(tl.float32)[:, None]
                added = ()
                for eighth in tl.static_range(EIGHTS):
                    added = added + (sums[eighth] + parts[eighth] * scale,)
                sums = added
        word_ptr += N * 32
        param_ptr += 128 // GROUP * N
        x_ptr += 128
    if DEPENDENT == "late":
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT == 1:
        for eighth in tl.static_range(EIGHTS):
            store_tile(
                tl.trans(sums[eighth]),
                out,
                bias,
                residual,
                m + eighth * 8,
                n0,
                M,
                N,
                BN,
                HAS_BIAS,
                HAS_RESIDUAL,
                PAIRED,
            )
    else:
        inner = m[:, None] * BN + tl.arange(0, BN)[None, :]
        SIZE: tl.constexpr = 8 * BN
        slot = (tile * SPLIT + piece) * EIGHTS
        for eighth in tl.static_range(EIGHTS):
            tl.store(partial + (slot + eighth) * SIZE + inner, tl.trans(sums[eighth]))
        tl.debug_barrier()
        order = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
        if order == SPLIT - 1:
            first = partial + tile * (SPLIT * EIGHTS) * SIZE + inner
            for eighth in tl.static_range(EIGHTS):
                total = tl.load(first + eighth * SIZE, cache_modifier=".cg")
                for other in tl.static_range(1, SPLIT):
                    total += tl.load(first + (other * EIGHTS + eighth) * SIZE, cache_modifier=".cg")
                store_tile(
                    total, out, bias, residual, m + eighth * 8, n0, M, N, BN, HAS_BIAS, HAS_RESIDUAL, PAIRED
                )
            tl.store(arrived + tile, 0)


@dataclass(frozen=True)
class SplitTile:
    """How `w4_split` cuts a product: tiles of BN rows, each in `split` pieces along K at most.

    `ahead`: blocks of a piece that a dependent launch asks for in L2 before it waits. `dependent` as in `GemmTile`.
    """

    bn: int
    split: int
    warps: int
    stages: int
    ahead: int = 4
    dependent: str = "waited"

    def __post_init__(self) -> None:
        check_dependent(self.dependent)
        if self.ahead < 1 or self.ahead & (self.ahead - 1):
            raise ValueError(f"ahead is {self.ahead}: a number of blocks that is a power of two.")
        if self.bn < 32 * self.warps:
            raise ValueError(f"bn {self.bn} with {self.warps} warps: a warp takes 32 rows or more.")


def pieces(blocks: int, split: int) -> tuple[int, int]:
    """(pieces, blocks of each but the last): `split` pieces of KB blocks, fewer where some would be empty."""
    run = -(-blocks // min(split, blocks))
    return -(-blocks // run), run


def launch_split(
    x: Tensor,
    weight: W4Weight,
    tile: SplitTile,
    workspace: Workspace,
    out: Tensor,
    residual: Tensor | None = None,
    is_dependent: bool = False,
) -> None:
    """Write the product of x (M, K) and `weight` to out (M, out_features). Operands as `w4a16_linear` has checked them.

    Fewer pieces than the tile says where their sums would not fit the workspace. Raises ValueError on more than 32 tokens.
    """
    tokens = x.shape[0]
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens: w4_split takes at most {MAX_TOKENS}.")
    eighths = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    tiles = -(-weight.rows // tile.bn)
    room = PARTIAL_FLOATS // (tiles * eighths * 8 * tile.bn) if tiles <= MAX_TILES else 1
    split, run = pieces(weight.blocks, max(1, min(tile.split, room)))
    dependent = tile.dependent if is_dependent else "never"
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if dependent != "never":
        options["launch_pdl"] = True
    w4_split[(tiles, split)](
        x, weight.words, weight.params, out, weight.bias, residual, workspace.partial, workspace.arrived,
        tokens, weight.rows, weight.in_features, weight.blocks, x.stride(0), run,
        GROUP=weight.group_size,
        EVEN_N=weight.rows % tile.bn == 0, EVEN_K=weight.in_features % BLOCK == 0,
        HAS_BIAS=weight.bias is not None, HAS_RESIDUAL=residual is not None, PAIRED=weight.is_paired,
        EIGHTS=eighths, BN=tile.bn, SPLIT=split, AHEAD=tile.ahead,
        ASM=not triton.knobs.runtime.interpret, DEPENDENT=dependent, **options,
    )  # fmt: skip
