# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# ruff: noqa: RUF005 (kernels add tuples; they cannot unpack one into another)
"""Products of experts for a few tokens: every program finds the pairs of its expert itself, so nothing is sorted beforehand.

A token-expert pairs, E experts, N rows of a weight, K in features, KB = ceil(K / 128) blocks along K.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.moe.weights import ExpertWeights
from kernels.w4a16.layout import BLOCK
from kernels.w4a16.unpack import centred, scale_of, zero_of

PADDED_PAIRS = (64, 256, 1024)  # a kernel is compiled for each of these numbers of pairs
MAX_PAIRS = PADDED_PAIRS[-1]


@triton.jit
def dot(w, x, acc, ASM: tl.constexpr):
    """acc + w x. The interpreter has no product of 16-bit floats that sums as the device does: float32 there."""
    if not ASM:
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(w, x, acc)


@triton.jit
def int4_rows(
    words, scale_zero, x, rows, live, n, N, K, KB, stride_x,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, EIGHTS: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Sums over K of one expert's rows n (BN,) for tokens `rows`, tuples of (8,): a tuple of (BN, 8) float32.

    words and scale_zero point at the expert; as in `w4_split`, q - z is exact in the dot and the scale multiplies the float32
    sum of a group.
    """
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    c = tl.arange(0, 32)
    k = c[:, None]
    word_ptr = words + n[:, None] * 32 + c[None, :]
    param_ptr = scale_zero + n
    sums = ()
    for _eighth in tl.static_range(EIGHTS):
        sums = sums + (tl.zeros([BN, 8], tl.float32),)
    for b in range(0, KB):
        w = tl.load(word_ptr, eviction_policy="evict_first")
        parts = sums
        for plane in tl.static_range(4):
            if plane * 32 % GROUP == 0:
                packed = tl.load(param_ptr + plane * 32 // GROUP * N, eviction_policy="evict_first")
            zero, _ = tl.broadcast(zero_of(packed, plane, BF16)[:, None], w)
            codes = centred(w, zero, plane, BF16, ASM)
            added = ()
            for eighth in tl.static_range(EIGHTS):
                mask = live[eighth][None, :]
                if not EVEN_K:
                    mask = mask & (k + plane * 32 < K - b * 128)
                tokens = tl.load(
                    x + rows[eighth][None, :] * stride_x + b * 128 + plane * 32 + k,
                    mask=mask,
                    other=0.0,
                    eviction_policy="evict_last",
                )
                start = tl.zeros([BN, 8], tl.float32) if plane * 32 % GROUP == 0 else parts[eighth]
                added = added + (dot(codes, tokens, start, ASM),)
            parts = added
            if (plane + 1) * 32 % GROUP == 0:
                scale = scale_of(packed).to(tl.float32)[:, None]
                added = ()
                for eighth in tl.static_range(EIGHTS):
                    added = added + (sums[eighth] + parts[eighth] * scale,)
                sums = added
        word_ptr += N * 32
        param_ptr += 128 // GROUP * N
    return sums


@triton.jit
def float_rows(
    weight, x, rows, live, n, K, stride_x, EIGHTS: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As `int4_rows` for one expert's float weight (N, K)."""
    k = tl.arange(0, 64)
    sums = ()
    for _eighth in tl.static_range(EIGHTS):
        sums = sums + (tl.zeros([BN, 8], tl.float32),)
    for begin in range(0, K, 64):
        inside = begin + k < K
        w = tl.load(
            weight + n[:, None].to(tl.int64) * K + begin + k[None, :],
            mask=inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        added = ()
        for eighth in tl.static_range(EIGHTS):
            tokens = tl.load(
                x + rows[eighth][None, :] * stride_x + begin + k[:, None],
                mask=live[eighth][None, :] & inside[:, None],
                other=0.0,
                eviction_policy="evict_last",
            )
            added = added + (dot(w, tokens, sums[eighth], ASM),)
        sums = added
    return sums


@triton.jit
def store_pairs(
    acc, out, weights, pair, live, n0, N, BN: tl.constexpr, PAIRED: tl.constexpr, WEIGHTED: tl.constexpr
):
    """out[pair] = f(acc) * weights[pair]: acc (pairs, BN) float32, f the identity or silu(gate) * up; one rounding."""
    if PAIRED:
        gate, up = tl.split(tl.reshape(acc, [acc.shape[0], BN // 2, 2]))
        value = gate / (1.0 + tl.exp(-gate)) * up
        column = n0 // 2 + tl.arange(0, BN // 2)
        width = N // 2
    else:
        value = acc
        column = n0 + tl.arange(0, BN)
        width = N
    if WEIGHTED:
        value = value * tl.load(weights + pair, mask=live, other=0.0)[:, None]
    offset = pair[:, None].to(tl.int64) * width + column[None, :]
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=live[:, None] & (column[None, :] < width))


@triton.jit(do_not_specialize=["A", "TOPK", "KB"])
def moe_few(
    x, chosen, weights, words, scale_zero, out,
    A, TOPK, N, K, KB, stride_x, stride_words, stride_scale,
    GROUP: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    PAIRED: tl.constexpr, WEIGHTED: tl.constexpr, BY_PAIR: tl.constexpr,
    BP: tl.constexpr, EIGHTS: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out[a, n] = f(sum_k x[a // TOPK, k] * w[e, n, k]) * weights[a] for every pair a, e = chosen[a]; f of `store_pairs`.

    x (T, K) fp16 or bf16, rows stride_x apart; chosen (A,) int32; weights (A,) float32, read where WEIGHTED; words
    (E, KB, N, 32) int16 and scale_zero (E, KB * P, N) int32, stride_words and stride_scale elements an expert, or for GROUP 0
    words (E, N, K) in the dtype of x; out (A, N), or (A, N / 2) where PAIRED, dtype of x.
    Rounding: sums in float32, one rounding at the end.
    Program (tile, slot): rows tile * BN ..; slot is an expert, or with BY_PAIR the first pair of one; programs without a
    pair end at once. 8 EIGHTS pairs at a time, so that an expert with more of them reads its weights again, from L2.
    BP >= A, a power of two. Ragged edges: rows >= N are read from row N - 1 and not stored; k >= K is read as zero.
    """
    tile = tl.program_id(0)
    slot = tl.program_id(1)
    index = tl.arange(0, BP)
    experts = tl.load(chosen + index, mask=index < A, other=-1)
    if BY_PAIR:
        expert = tl.load(chosen + slot)
    else:
        expert = slot
    mine = experts == expert
    count = tl.sum(mine.to(tl.int32), 0)
    if BY_PAIR and tl.min(tl.where(mine, index, BP), 0) != slot:
        count = 0
    rank = tl.where(mine, tl.cumsum(mine.to(tl.int32), 0) - 1, -1)
    n0 = tile * BN
    n = n0 + tl.arange(0, BN)
    if not EVEN_N:
        n = tl.minimum(n, N - 1)
    m = tl.arange(0, 8)
    for begin in range(0, count, 8 * EIGHTS):
        pairs = ()
        rows = ()
        live = ()
        for eighth in tl.static_range(EIGHTS):
            want = begin + eighth * 8 + m
            pair = tl.sum(tl.where(rank[:, None] == want[None, :], index[:, None], 0), 0)
            pairs = pairs + (pair,)
            rows = rows + (pair // TOPK,)
            live = live + (want < count,)
        if GROUP:
            sums = int4_rows(
                words + expert.to(tl.int64) * stride_words, scale_zero + expert.to(tl.int64) * stride_scale,
                x, rows, live, n, N, K, KB, stride_x, GROUP, EVEN_K, EIGHTS, BN, ASM,
            )  # fmt: skip
        else:
            sums = float_rows(
                words + expert.to(tl.int64) * stride_words, x, rows, live, n, K, stride_x, EIGHTS, BN, ASM
            )
        for eighth in tl.static_range(EIGHTS):
            store_pairs(
                tl.trans(sums[eighth]), out, weights, pairs[eighth], live[eighth], n0, N, BN, PAIRED, WEIGHTED
            )


@dataclass(frozen=True)
class FewTile:
    """How `moe_few` cuts a product: tiles of bn rows, 8 * eighths pairs at a time."""

    bn: int
    warps: int
    stages: int
    eighths: int = 1

    def __post_init__(self) -> None:
        if self.bn < 16 * self.warps or self.bn & (self.bn - 1):
            raise ValueError(f"bn {self.bn} with {self.warps} warps: a power of two, 16 rows or more a warp.")
        if self.eighths not in (1, 2, 4):
            raise ValueError(f"eighths is {self.eighths}, expected 1, 2 or 4.")


def launch_few(
    x: Tensor,
    chosen: Tensor,
    weight: ExpertWeights,
    tile: FewTile,
    out: Tensor,
    topk: int,
    weights: Tensor | None = None,
) -> None:
    """Write the product of every pair to out (A, out_features). chosen (A,) int32; row a // topk of x belongs to pair a.

    Raises ValueError for more than MAX_PAIRS pairs.
    """
    pairs = chosen.shape[0]
    if pairs > MAX_PAIRS:
        raise ValueError(f"{pairs} pairs of tokens and experts: moe_few takes at most {MAX_PAIRS}.")
    by_pair = pairs <= weight.experts
    blocks = -(-weight.in_features // BLOCK)
    grid = (-(-weight.rows // tile.bn), pairs if by_pair else weight.experts)
    moe_few[grid](
        x, chosen, weights, weight.words, weight.params, out,
        pairs, topk, weight.rows, weight.in_features, blocks, x.stride(0),
        weight.words.stride(0), 0 if weight.params is None else weight.params.stride(0),
        GROUP=weight.group_size, EVEN_N=weight.rows % tile.bn == 0, EVEN_K=weight.in_features % BLOCK == 0,
        PAIRED=weight.is_paired, WEIGHTED=weights is not None, BY_PAIR=by_pair,
        BP=next(size for size in PADDED_PAIRS if size >= pairs), EIGHTS=tile.eighths, BN=tile.bn,
        ASM=not triton.knobs.runtime.interpret, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
