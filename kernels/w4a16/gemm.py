# mypy: allow-untyped-defs, allow-incomplete-defs
"""W4A16 product on the tensor cores: 4-bit codes are unpacked in registers on their way into `tl.dot`.

M tokens, N rows of the weight, K in features, KB = ceil(K / 128) blocks, T output tiles of BM x BN.
The unit of work is one block of 128 k of one tile. The T * KB units are dealt out in equal runs to the programs
("stream-K", Osama et al., 2023), so that all multiprocessors end together whatever the shape. A tile that several programs share is
summed from float32 partials in the order of k by whichever program arrives last: the result does not depend on the order of arrival.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.w4a16.layout import BLOCK, W4Weight
from kernels.w4a16.schedule import UNROLLED, GemmTile, Workspace, compiled_segments, schedule
from kernels.w4a16.unpack import ask_ahead, centred, scale_of, store_tile, times, zero_of

UNROLL_LIMIT = tl.constexpr(UNROLLED)  # elements of a tile up to which the reduction is unrolled


@triton.jit
def _dot(w, x, acc, SWAP: tl.constexpr, ASM: tl.constexpr):
    """acc + the product of weights and tokens, the weights on the left for SWAP. The interpreter has no bf16 dot: float32."""
    if not ASM:
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(w, x, acc) if SWAP else tl.dot(x, w, acc)


@triton.jit
def _block_dot(
    acc, words, xs, scale_zero, N,
    GROUP: tl.constexpr, SWAP: tl.constexpr, SCALE_FIRST: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc + the product of one block. words (32, BN) or (BN, 32) for SWAP; scale_zero: pointers (BN,) of the first group."""
    part = tl.zeros_like(acc)
    for plane in tl.static_range(4):
        if plane * 32 % GROUP == 0:
            packed = tl.load(scale_zero + plane * 32 // GROUP * N, eviction_policy="evict_first")
            scale = scale_of(packed)
        zero = zero_of(packed, plane, BF16)
        if SWAP:
            zero, _ = tl.broadcast(zero[:, None], words)
        else:
            zero, _ = tl.broadcast(zero[None, :], words)
        w = centred(words, zero, plane, BF16, ASM)
        x = xs[plane]
        if SCALE_FIRST:
            factor = scale.to(tl.float32).to(tl.bfloat16) if BF16 else scale
            if SWAP:
                factor, _ = tl.broadcast(factor[:, None], w)
            else:
                factor, _ = tl.broadcast(factor[None, :], w)
            w = times(w, factor, BF16, ASM)
            acc = _dot(w, x, acc, SWAP, ASM)
        else:
            if plane * 32 % GROUP == 0:
                part = tl.zeros_like(acc)
            part = _dot(w, x, part, SWAP, ASM)
            if (plane + 1) * 32 % GROUP == 0:
                wide = scale.to(tl.float32)
                acc += part * (wide[:, None] if SWAP else wide[None, :])
    return acc


@triton.jit
def _partial(partial, inner, program, tile, run, KB, SIZE: tl.constexpr, mask):
    """What `program` has stored for `tile`: in its second slot unless the tile is its first."""
    slot = program * 2 + (tile != program * run // KB).to(tl.int32)
    return tl.load(partial + slot * SIZE + inner, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit(do_not_specialize=["M", "run"])
def w4_matmul(
    x, words, scale_zero, out, bias, residual, partial, arrived,
    M, N, K, KB, stride_x, run,
    GROUP: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PAIRED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr, SCALE_FIRST: tl.constexpr, SEGMENTS: tl.constexpr,
    ASM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[m, n] = f(sum_k x[m, k] * (q[n, k] - z[n, g]) * s[n, g] + bias[n]) + residual[m, n], f of `store_tile`.

    x (M, K) fp16 or bf16, rows `stride_x` apart; words (KB, N, 32) int16 and scale_zero (KB * P, N) int32 of
    `w4a16_layout`; out, residual (M, N) or (M, N / 2) row-major, dtype of x; bias (N,); partial: float32 workspace of two
    tiles for each program; arrived (T,) int32, zero before and after.
    Rounding: SCALE_FIRST rounds (q - z) * s once to the dtype of x before the dot (for bf16 also s); otherwise q - z is exact
    in the dot and s multiplies the float32 sum of a group. Products accumulate in float32; one rounding at the end.
    Tiles: BM, BN powers of two, BN >= 16, BM >= 16, or 8 with SWAP (the weights are the left operand, BN >= 64);
    SEGMENTS >= programs in a tile (any number above 1 where BM * BN > 4096).
    Ragged edges: rows >= N are read from row N - 1 and not stored; tokens >= M and k >= K are read as zero.
    """
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    program = tl.program_id(0)
    m_tiles = (M + BM - 1) // BM
    total = m_tiles * ((N + BN - 1) // BN) * KB
    begin = program * run
    end = tl.minimum(begin + run, total)
    c = tl.arange(0, 32)
    if DEPENDENT == "waited":
        if EVEN_N:
            n0 = begin // KB // m_tiles * BN
            ask_ahead(words, scale_zero, n0, begin % KB, KB, N, GROUP, 32, BN, 8)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    elif DEPENDENT != "never":
        if DEPENDENT == "early":
            tl.extra.cuda.gdc_launch_dependents()
        first = begin // KB // m_tiles * BN
        ahead = tl.arange(0, 4)
        row = tl.minimum(first + tl.arange(0, BN // 2) * 2, N - 1)
        block = tl.minimum(begin % KB + ahead, KB - 1)
        line = words + (block[:, None] * N + row[None, :]) * 32
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.extra.cuda.gdc_wait()
    for tile in range(begin // KB, (end + KB - 1) // KB):
        b0 = tl.maximum(begin - tile * KB, 0)
        b1 = tl.minimum(end - tile * KB, KB)
        n0 = tile // m_tiles * BN
        m = tile % m_tiles * BM + tl.arange(0, BM)
        n = n0 + tl.arange(0, BN)
        if not EVEN_N:
            n = tl.minimum(n, N - 1)
        if SWAP:
            word_ptr = words + (b0 * N + n[:, None]) * 32 + c[None, :]
            k = c[:, None]
            x_ptr = x + b0 * 128 + m[None, :] * stride_x + k
            live = m[None, :] < M
            acc = tl.zeros([BN, BM], tl.float32)
        else:
            word_ptr = words + (b0 * N + n[None, :]) * 32 + c[:, None]
            x_ptr = x + b0 * 128 + m[:, None] * stride_x + c[None, :]
            live = m[:, None] < M
            k = c[None, :]
            acc = tl.zeros([BM, BN], tl.float32)
        param_ptr = scale_zero + b0 * (128 // GROUP) * N + n
        for b in range(b0, b1):
            w = tl.load(word_ptr, eviction_policy="evict_first")
            if EVEN_K:
                x0 = tl.load(x_ptr, mask=live, other=0.0, eviction_policy="evict_last")
                x1 = tl.load(x_ptr + 32, mask=live, other=0.0, eviction_policy="evict_last")
                x2 = tl.load(x_ptr + 64, mask=live, other=0.0, eviction_policy="evict_last")
                x3 = tl.load(x_ptr + 96, mask=live, other=0.0, eviction_policy="evict_last")
            else:
                left = K - b * 128
                x0 = tl.load(x_ptr, mask=live & (k < left), other=0.0)
                x1 = tl.load(x_ptr + 32, mask=live & (k + 32 < left), other=0.0)
                x2 = tl.load(x_ptr + 64, mask=live & (k + 64 < left), other=0.0)
                x3 = tl.load(x_ptr + 96, mask=live & (k + 96 < left), other=0.0)
            acc = _block_dot(acc, w, (x0, x1, x2, x3), param_ptr, N, GROUP, SWAP, SCALE_FIRST, BF16, ASM)
            word_ptr += N * 32
            param_ptr += 128 // GROUP * N
            x_ptr += 128
        if DEPENDENT == "late":
            tl.extra.cuda.gdc_launch_dependents()
        complete = True
        if SEGMENTS > 1:
            first_program = tile * KB // run
            segments = (tile * KB + KB - 1) // run - first_program + 1
            if segments > 1:
                if SWAP:
                    inner = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
                else:
                    inner = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
                slot = program * 2 + (tile != begin // KB).to(tl.int32)
                tl.store(partial + slot * (BM * BN) + inner, acc, mask=live)
                tl.debug_barrier()
                order = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
                complete = order == segments - 1
                if complete:
                    acc = tl.zeros_like(acc)
                    count = tl.where(live, segments, 0)  # a vector: the interpreter takes no scalar masks
                    if BM * BN <= UNROLL_LIMIT:  # all partials in flight at once
                        for s in tl.static_range(SEGMENTS):
                            acc += _partial(
                                partial, inner, first_program + s, tile, run, KB, BM * BN, s < count
                            )
                    else:
                        for s in range(segments):
                            acc += _partial(
                                partial, inner, first_program + s, tile, run, KB, BM * BN, s < count
                            )
                    tl.store(arrived + tile, 0)
        if complete:
            result = tl.trans(acc) if SWAP else acc
            store_tile(result, out, bias, residual, m, n0, M, N, BN, HAS_BIAS, HAS_RESIDUAL, PAIRED)


def launch_gemm(
    x: Tensor,
    weight: W4Weight,
    tile: GemmTile,
    multiprocessors: int,
    workspace: Workspace,
    out: Tensor,
    residual: Tensor | None = None,
    is_dependent: bool = False,
) -> None:
    """Write the product of x (M, K) and `weight` to out (M, out_features). Operands as `w4a16_linear` has checked them."""
    tokens = x.shape[0]
    plan = schedule(tokens, weight.rows, weight.blocks, tile, multiprocessors)
    dependent = tile.dependent if is_dependent else "never"
    interpreted = triton.knobs.runtime.interpret
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if dependent != "never":
        options["launch_pdl"] = True
    w4_matmul[(plan.programs,)](
        x, weight.words, weight.params, out, weight.bias, residual, workspace.partial, workspace.arrived,
        tokens, weight.rows, weight.in_features, weight.blocks, x.stride(0), plan.run,
        GROUP=weight.group_size,
        EVEN_N=weight.rows % tile.bn == 0, EVEN_K=weight.in_features % BLOCK == 0,
        HAS_BIAS=weight.bias is not None, HAS_RESIDUAL=residual is not None, PAIRED=weight.is_paired,
        BM=tile.bm, BN=tile.bn, SWAP=tile.swap, SCALE_FIRST=tile.scale_first,
        SEGMENTS=compiled_segments(tile, plan),
        ASM=not interpreted, DEPENDENT=dependent, **options,
    )  # fmt: skip
