# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
"""Products of experts for many tokens: pairs sorted by expert, one block of them by one tile of rows for each program.

A token-expert pairs, E experts, N rows of a weight, K in features, KB = ceil(K / 128) blocks along K.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.moe.few import dot, store_pairs
from kernels.moe.sorting import SortedPairs
from kernels.moe.weights import ExpertWeights
from kernels.w4a16.layout import BLOCK
from kernels.w4a16.unpack import centred, scale_of, times, zero_of


@triton.jit
def _int4_block(acc, w, x_ptr, live, k, left, param_ptr, N,
                GROUP: tl.constexpr, EVEN_K: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """acc (BN, BM) + one block of 128 k: w (BN, 32) words, x_ptr (32, BM) pointers at k = 0 of the block."""
    for plane in tl.static_range(4):
        if plane * 32 % GROUP == 0:
            packed = tl.load(param_ptr + plane * 32 // GROUP * N)
            scale = scale_of(packed)
            factor = scale.to(tl.float32).to(tl.bfloat16) if BF16 else scale
        zero, _ = tl.broadcast(zero_of(packed, plane, BF16)[:, None], w)
        codes = centred(w, zero, plane, BF16, ASM)
        wide, _ = tl.broadcast(factor[:, None], codes)
        codes = times(codes, wide, BF16, ASM)
        mask = live if EVEN_K else live & (k + plane * 32 < left)
        tokens = tl.load(x_ptr + plane * 32, mask=mask, other=0.0)
        acc = dot(codes, tokens, acc, ASM)
    return acc


@triton.jit(do_not_specialize=["A", "blocks", "TOPK", "KB"])
def moe_many(
    x, order, block_expert, block_first, ends, weights, words, scale_zero, out,
    A, blocks, TOPK, N, K, KB, stride_x, stride_words, stride_scale,
    GROUP: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PAIRED: tl.constexpr, WEIGHTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out[a, n] = f(sum_k x[a // TOPK, k] * w[e, n, k]) * weights[a] for every pair a, e its expert; operands as `moe_few` has them.

    order, block_expert, block_first and ends of `SortedPairs`, blocks of BM pairs. Rounding: (q - z) * s once to the dtype
    of x before the dot (for bf16 also s); products accumulate in float32; one rounding at the end.
    Program (block, tile): the blocks of one expert run next to each other, so that they share its weights in L2.
    Tiles: BM >= 16 pairs by BN >= 64 rows, powers of two; the weights are the left operand.
    Ragged edges: rows >= N are read from row N - 1 and not stored; pairs of other experts and k >= K are read as zero.
    """
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    block = tl.program_id(0)
    expert = tl.load(block_expert + block)
    if expert < 0:
        return
    place = tl.load(block_first + block) + tl.arange(0, BM)
    live = place < tl.load(ends + expert)
    pair = tl.load(order + place, mask=live, other=0)
    rows = (pair // TOPK).to(tl.int64)
    n0 = tl.program_id(1) * BN
    n = n0 + tl.arange(0, BN)
    if not EVEN_N:
        n = tl.minimum(n, N - 1)
    acc = tl.zeros([BN, BM], tl.float32)
    if GROUP:
        c = tl.arange(0, 32)
        k = c[:, None]
        word_ptr = words + expert.to(tl.int64) * stride_words + n[:, None] * 32 + c[None, :]
        param_ptr = scale_zero + expert.to(tl.int64) * stride_scale + n
        x_ptr = x + rows[None, :] * stride_x + k
        for b in range(0, KB):
            w = tl.load(word_ptr)
            acc = _int4_block(
                acc, w, x_ptr, live[None, :], k, K - b * 128, param_ptr, N, GROUP, EVEN_K, BF16, ASM
            )
            word_ptr += N * 32
            param_ptr += 128 // GROUP * N
            x_ptr += 128
    else:
        k = tl.arange(0, 64)
        w_ptr = words + expert.to(tl.int64) * stride_words + n[:, None].to(tl.int64) * K + k[None, :]
        x_ptr = x + rows[None, :] * stride_x + k[:, None]
        for begin in range(0, K, 64):
            inside = begin + k < K
            w = tl.load(w_ptr, mask=inside[None, :], other=0.0)
            tokens = tl.load(x_ptr, mask=live[None, :] & inside[:, None], other=0.0)
            acc = dot(w, tokens, acc, ASM)
            w_ptr += 64
            x_ptr += 64
    store_pairs(tl.trans(acc), out, weights, pair, live, n0, N, BN, PAIRED, WEIGHTED)


@dataclass(frozen=True)
class ManyTile:
    """How `moe_many` cuts a product: blocks of bm pairs by tiles of bn rows."""

    bm: int
    bn: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        if self.bm < 16 or self.bn < 64 or self.bm & (self.bm - 1) or self.bn & (self.bn - 1):
            raise ValueError(f"bm {self.bm}, bn {self.bn}: powers of two, at least 16 and 64.")


def launch_many(
    x: Tensor,
    pairs: SortedPairs,
    weight: ExpertWeights,
    tile: ManyTile,
    out: Tensor,
    topk: int,
    weights: Tensor | None = None,
) -> None:
    """Write the product of every pair to out (A, out_features). `pairs` was sorted for blocks of tile.bm."""
    moe_many[(pairs.blocks, -(-weight.rows // tile.bn))](
        x, pairs.order, pairs.expert, pairs.first, pairs.end, weights, weight.words, weight.params, out,
        pairs.order.shape[0], pairs.blocks, topk, weight.rows, weight.in_features, -(-weight.in_features // BLOCK),
        x.stride(0), weight.words.stride(0), 0 if weight.params is None else weight.params.stride(0),
        GROUP=weight.group_size, EVEN_N=weight.rows % tile.bn == 0, EVEN_K=weight.in_features % BLOCK == 0,
        PAIRED=weight.is_paired, WEIGHTED=weights is not None, BM=tile.bm, BN=tile.bn,
        ASM=not triton.knobs.runtime.interpret, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
