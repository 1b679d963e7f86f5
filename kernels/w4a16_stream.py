# mypy: allow-untyped-defs, allow-incomplete-defs
"""W4A16 product of one token on the CUDA cores, with words and params on their way through shared memory stages ahead.

N rows of the weight, K in features, KB = ceil(K / 128) blocks, P groups in a block. The arithmetic is that of `w4a16_gemv`,
where a warp keeps its next words in registers and the compiler issues their loads late; here `tl.range(num_stages=...)`
turns the loads of a turn into asynchronous copies, so that memory always has STAGES - 1 turns of every program to do.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.w4a16_gemv import centred_halves, high_bf16, load_x, low_bf16, product, sum_halves
from kernels.w4a16_layout import BLOCK, W4Weight
from kernels.w4a16_unpack import ask_ahead, check_dependent, scale_of, store_tile


@triton.jit
def w4_stream(
    x, words, scale_zero, out, bias, residual,
    N, K, KB,
    GROUP: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, EVEN_TURNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PAIRED: tl.constexpr, BF16: tl.constexpr,
    BN: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    ASM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[n] = f(sum_k x[k] * (q[n, k] - z[n, g]) * s[n, g] + bias[n]) + residual[n], f of `store_tile`.

    Operands, rounding and ragged edges as in `w4_gemv`. Tiles: BN rows by BLOCKS blocks a turn; AHEAD blocks are asked
    for in L2 before the wait of a dependent launch.
    """
    n0 = tl.program_id(0) * BN
    if DEPENDENT == "early":
        tl.extra.cuda.gdc_launch_dependents()
    if DEPENDENT != "never":
        if EVEN_N:
            ask_ahead(words, scale_zero, n0, 0, KB, N, GROUP, 16, BN, AHEAD)  # words are int32 here
        tl.extra.cuda.gdc_wait()
        if DEPENDENT == "waited":
            tl.extra.cuda.gdc_launch_dependents()
    n = (n0 + tl.arange(0, BN))[:, None, None]
    if not EVEN_N:
        n = tl.minimum(n, N - 1)
    block = tl.arange(0, BLOCKS)[None, :, None]
    c = tl.arange(0, 16)[None, None, :]
    acc = tl.zeros([BN, BLOCKS, 16], tl.float32)
    for start in tl.range(0, KB, BLOCKS, num_stages=STAGES):
        b = start + block
        inside = b < KB
        if (
            not EVEN_TURNS
        ):  # read the last block again, with scales of zero: no mask, so that loads stay 16 bytes wide
            b = tl.minimum(b, KB - 1)
        pair = b * 64 + c
        w = tl.load(words + (b * N + n) * 16 + c, eviction_policy="evict_first")
        x0 = load_x(x + pair, pair < K // 2, not EVEN_K, ASM)
        x1 = load_x(x + pair + 16, pair + 16 < K // 2, not EVEN_K, ASM)
        x2 = load_x(x + pair + 32, pair + 32 < K // 2, not EVEN_K, ASM)
        x3 = load_x(x + pair + 48, pair + 48 < K // 2, not EVEN_K, ASM)
        slices = (x0, x1, x2, x3)
        total = w
        wide = acc
        for plane in tl.static_range(4):
            if plane * 32 % GROUP == 0:
                params = scale_zero + (b * (128 // GROUP) + plane * 32 // GROUP) * N + n
                packed = tl.load(params, eviction_policy="evict_first")
                if not EVEN_TURNS:
                    packed = tl.where(inside, packed, 0)
                packed, _ = tl.broadcast(packed, w)
            tokens, _ = tl.broadcast(slices[plane], w)
            if BF16:
                low, high = centred_halves(w, packed, plane, ASM)
                both = low * low_bf16(tokens) + high * high_bf16(tokens)
                wide = both if plane * 32 % GROUP == 0 else wide + both
                if (plane + 1) * 32 % GROUP == 0:
                    acc += wide * scale_of(packed).to(tl.float32)
            else:
                total = product(w, tokens, packed, total, plane, plane * 32 % GROUP == 0, ASM)
                if (plane + 1) * 32 % GROUP == 0:
                    acc += sum_halves(total, ASM) * (scale_of(packed).to(tl.float32) * 16.0)
    if DEPENDENT == "late":
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.sum(tl.sum(acc, 2), 1)[None, :]
    store_tile(rows, out, bias, residual, tl.arange(0, 1), n0, 1, N, BN, HAS_BIAS, HAS_RESIDUAL, PAIRED)


@dataclass(frozen=True)
class StreamTile:
    """How `w4_stream` cuts a product: BN rows by BLOCKS blocks of 128 k a turn, `stages` - 1 turns on their way.

    `ahead`: blocks that a dependent launch asks for in L2 before it waits. `dependent` as in `GemmTile`.
    """

    bn: int
    blocks: int
    warps: int
    stages: int
    ahead: int = 8
    dependent: str = "waited"

    def __post_init__(self) -> None:
        check_dependent(self.dependent)
        if self.ahead < 1 or self.ahead & (self.ahead - 1):
            raise ValueError(f"ahead is {self.ahead}: a number of blocks that is a power of two.")


def launch_stream(
    x: Tensor,
    weight: W4Weight,
    tile: StreamTile,
    out: Tensor,
    residual: Tensor | None = None,
    is_dependent: bool = False,
) -> None:
    """Write the product of x (1, K) and `weight` to out (1, out_features). Operands as `w4a16_linear` has checked them."""
    dependent = tile.dependent if is_dependent else "never"
    options = {"num_warps": tile.warps}
    if dependent != "never":
        options["launch_pdl"] = True
    w4_stream[(-(-weight.rows // tile.bn),)](
        x.view(torch.int32), weight.words.view(torch.int32), weight.params, out, weight.bias, residual,
        weight.rows, weight.in_features, weight.blocks,
        GROUP=weight.group_size,
        EVEN_N=weight.rows % tile.bn == 0, EVEN_K=weight.in_features % BLOCK == 0, EVEN_TURNS=weight.blocks % tile.blocks == 0,
        HAS_BIAS=weight.bias is not None, HAS_RESIDUAL=residual is not None, PAIRED=weight.is_paired,
        BF16=x.dtype == torch.bfloat16, BN=tile.bn, BLOCKS=tile.blocks, STAGES=tile.stages, AHEAD=tile.ahead,
        ASM=not triton.knobs.runtime.interpret, DEPENDENT=dependent, **options,
    )  # fmt: skip
