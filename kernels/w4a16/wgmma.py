# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# ruff: noqa: RUF005 (kernels add tuples; they cannot unpack one into another)
"""W4A16 product on Hopper's warp-group tensor cores, in Gluon: one warp fetches; one, two or four warp groups unpack and multiply.

M tokens, N rows of the weight, K in features, KB = ceil(K / 128) blocks, P groups in a block. A tile is BN rows by BM tokens.
The fetching warp keeps a ring of STAGES blocks in shared memory full (bulk tensor copies, one barrier for "full" and one for
"empty" a stage). Each warp group owns BN / PARTS rows of the tile: it unpacks 32 k into registers, the left operand of `wgmma`,
while the products of the 32 k before run, and the first 32 k of the next block while the last of this one run.
Products cross no turn of the loop in flight: ptxas would put them one after the other.
Units of work and the sums of shared tiles are those of `w4a16_gemm`. Import this where Gluon exists (`has_wgmma` of w4a16 tells).
"""

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.w4a16 import unpack as w4a16_unpack
from kernels.w4a16.layout import BLOCK, W4Weight
from kernels.w4a16.schedule import WgmmaTile, Workspace, schedule
from kernels.w4a16.wgmma_store import finish, merge

_fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name before and after 3.7
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_centred, _times, _scale_of, _zero_of = (
    gluon.jit(getattr(w4a16_unpack, name).fn) for name in ("centred", "times", "scale_of", "zero_of")
)


@gluon.jit
def _fetch_weights(
    word_desc, param_desc, words, params, full, unit, stage, N, KB, m_tiles,
    GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Announce all bytes of a stage, then ask for its words (BN, 32) and P times params (BN,)."""
    P: gl.constexpr = 128 // GROUP
    n0 = unit // KB // m_tiles * BN
    block = unit % KB
    ready = full.index(stage)
    mbarrier.expect(ready, BM * 256 + BN * 64 + P * BN * 4)
    _fetch(word_desc, [block * N + n0, 0], ready, words.index(stage))
    for group in gl.static_range(P):
        _fetch(param_desc, [(block * P + group) * N + n0], ready, params.index(stage * P + group))


@gluon.jit
def _produce(
    x_desc, word_desc, param_desc, xs, words, params, full, empty, begin, end, N, KB, m_tiles,
    GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Fetch units begin .. end - 1 into the ring; weights, which no kernel ahead writes, before waiting for that kernel."""
    for unit in range(begin, gl.minimum(begin + STAGES, end)):
        _fetch_weights(
            word_desc, param_desc, words, params, full, unit, unit - begin, N, KB, m_tiles, GROUP, BM, BN
        )
    if DEPENDENT != "never":
        gdc_wait()
        if DEPENDENT == "waited":
            gdc_launch_dependents()
    for unit in range(begin, end):
        turn = unit - begin
        stage = turn % STAGES
        if turn >= STAGES:
            mbarrier.wait(empty.index(stage), (turn // STAGES & 1) ^ 1)
            _fetch_weights(
                word_desc, param_desc, words, params, full, unit, stage, N, KB, m_tiles, GROUP, BM, BN
            )
        m0 = unit // KB % m_tiles * BM
        _fetch(x_desc, [m0, unit % KB * 128], full.index(stage), xs.index(stage))
    if DEPENDENT == "late":
        gdc_launch_dependents()


@gluon.jit
def _params_of(params, stage, n: gl.constexpr, ROWS: gl.constexpr, P: gl.constexpr, LAYOUT: gl.constexpr):
    """Params of rows n .. n + ROWS - 1 of a stage: P tensors (ROWS,) int32."""
    loaded = (params.index(stage * P).slice(n, ROWS).load(LAYOUT),)
    for group in gl.static_range(1, P):
        loaded = loaded + (params.index(stage * P + group).slice(n, ROWS).load(LAYOUT),)
    return loaded


@gluon.jit
def _operand(codes, scales, PLANE: gl.constexpr, GROUP: gl.constexpr, BF16: gl.constexpr):
    """(q - z) * s of nibble PLANE as left operand (ROWS, 32). codes (ROWS, 32) int16; scales of `_params_of`."""
    packed = scales[PLANE * 32 // GROUP]
    scale = _scale_of(packed)
    factor = scale.to(gl.float32).to(gl.bfloat16) if BF16 else scale
    zero, _ = gl.broadcast(gl.expand_dims(_zero_of(packed, PLANE, BF16), 1), codes)
    a = _centred(codes, zero, PLANE, BF16, True)
    wide, _ = gl.broadcast(gl.expand_dims(factor, 1), a)
    return _times(a, wide, BF16, True)


@gluon.jit
def _first_operand(
    full, words, params, turn, n: gl.constexpr, ROWS: gl.constexpr, LEFT: gl.constexpr,
    GROUP: gl.constexpr, BF16: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Wait for the block of a turn; its plane 0 as left operand."""
    stage = turn % STAGES
    mbarrier.wait(full.index(stage), turn // STAGES & 1)
    codes = words.index(stage).slice(n, ROWS).load(LEFT)
    scales = _params_of(params, stage, n, ROWS, 128 // GROUP, gl.SliceLayout(1, LEFT))
    return _operand(codes, scales, 0, GROUP, BF16)


@gluon.jit
def _consume(
    out, bias, residual, partial, arrived, xs, words, params, full, empty,
    begin, end, run, M, N, KB, m_tiles,
    PART: gl.constexpr, PARTS: gl.constexpr, SHARED: gl.constexpr, BF16: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, PAIRED: gl.constexpr,
    GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, PENDING: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Units begin .. end - 1, rows PART * ROWS .. of each tile: multiply, then store the tile or its partial sum."""
    P: gl.constexpr = 128 // GROUP
    ROWS: gl.constexpr = BN // PARTS
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LEFT)
    if DEPENDENT != "never":
        gdc_wait()
    turn = 0
    for tile in range(begin // KB, (end + KB - 1) // KB):
        blocks = gl.minimum(end - tile * KB, KB) - gl.maximum(begin - tile * KB, 0)
        acc = gl.zeros([ROWS, BM], gl.float32, SUM)
        a = _first_operand(full, words, params, turn, PART * ROWS, ROWS, LEFT, GROUP, BF16, STAGES)
        for block in range(blocks):
            stage = turn % STAGES
            x = xs.index(stage)
            pending = warpgroup_mma(a, x.slice(0, 32, 1).permute((1, 0)), acc, is_async=True)
            codes = words.index(stage).slice(PART * ROWS, ROWS).load(LEFT)
            scales = _params_of(params, stage, PART * ROWS, ROWS, P, ROW)
            for plane in gl.static_range(1, 4):
                a = _operand(codes, scales, plane, GROUP, BF16)
                acc = warpgroup_mma_wait(PENDING, deps=(pending,))
                pending = warpgroup_mma(a, x.slice(plane * 32, 32, 1).permute((1, 0)), acc, is_async=True)
            turn += 1
            if block + 1 < blocks:
                a = _first_operand(full, words, params, turn, PART * ROWS, ROWS, LEFT, GROUP, BF16, STAGES)
            acc = warpgroup_mma_wait(0, deps=(pending,))
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES))
        m0 = tile % m_tiles * BM
        n0 = tile // m_tiles * BN + PART * ROWS
        is_whole = True
        if SHARED:
            first = tile * KB // run
            last = (tile * KB + KB - 1) // run + 1
            is_whole = last - first == 1
            if not is_whole:
                row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, SUM)), 1)
                token = gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(0, SUM)), 0)
                slot = (gl.program_id(0) * 2 + (tile != begin // KB).to(gl.int32)) * PARTS + PART
                gl.store(partial + slot * (ROWS * BM) + token * ROWS + row, acc)
                _barrier()
                order = gl.atomic_add(arrived + tile * PARTS + PART, 1, sem="acq_rel")
                if order == last - first - 1:
                    merge(partial, out, bias, residual, first, last, tile, run, m0, n0, M, N, KB, PART, PARTS,
                           HAS_BIAS, HAS_RESIDUAL, PAIRED, ROWS, BM)  # fmt: skip
                    gl.store(arrived + tile * PARTS + PART, 0)
        if is_whole:
            finish(acc, out, bias, residual, m0, n0, M, N, HAS_BIAS, HAS_RESIDUAL, PAIRED, BM)


@gluon.jit(do_not_specialize=["M", "KB", "run"])
def w4_wgmma(
    x_desc, word_desc, param_desc, out, bias, residual, partial, arrived,
    M, N, KB, run,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, PAIRED: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, PENDING: gl.constexpr,
    SHARED: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """out[m, n] = f(sum_k x[m, k] * (q[n, k] - z[n, g]) * s[n, g] + bias[n]) + residual[m, n], f of `store_tile`.

    x_desc: x (M, K) fp16 or bf16 in boxes (BM, 128), zero beyond M and K; word_desc: words (KB * N, 32) int16 in boxes (BN, 32);
    param_desc: params (KB * P * N,) int32 in boxes (BN,); out, residual (M, N) or (M, N / 2) row-major, dtype of x; bias (N,);
    partial: float32, two tiles for each program; arrived: int32, PARTS for each tile, zero before and after.
    Rounding: (q - z) * s once to the dtype of x (for bf16 also s); products accumulate in float32; one rounding at the end.
    Tiles: BM 16 to 256, BN / PARTS 64 or 128 with PARTS 1, 2 or 4 and BN at most 256; PENDING 1 to 3 groups of products in flight when the next is
    issued. SHARED: programs may share a tile; else each program has whole tiles. Needs 4 warps and compute capability 9.0.
    Ragged edges: rows beyond a block belong to the next block or are zero, and are not stored.
    """
    if DEPENDENT == "early":
        gdc_launch_dependents()
    BF16: gl.constexpr = x_desc.dtype == gl.bfloat16
    P: gl.constexpr = 128 // GROUP
    m_tiles = (M + BM - 1) // BM
    total = m_tiles * ((N + BN - 1) // BN) * KB
    begin = gl.program_id(0) * run
    end = gl.minimum(begin + run, total)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, 128], x_desc.layout)
    words = gl.allocate_shared_memory(gl.int16, [STAGES, BN, 32], word_desc.layout)
    params = gl.allocate_shared_memory(gl.int32, [STAGES * P, BN], param_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=PARTS)
    # Written out: Gluon keeps a constant of a partition's arguments only where it stands in the call itself.
    if PARTS == 4:
        gl.warp_specialize(
            [
                (_consume, (out, bias, residual, partial, arrived, xs, words, params, full, empty,
                            begin, end, run, M, N, KB, m_tiles, 0, PARTS, SHARED, BF16,
                            HAS_BIAS, HAS_RESIDUAL, PAIRED, GROUP, BM, BN, STAGES, PENDING, DEPENDENT)),
                (_consume, (out, bias, residual, partial, arrived, xs, words, params, full, empty,
                            begin, end, run, M, N, KB, m_tiles, 1, PARTS, SHARED, BF16,
                            HAS_BIAS, HAS_RESIDUAL, PAIRED, GROUP, BM, BN, STAGES, PENDING, DEPENDENT)),
                (_consume, (out, bias, residual, partial, arrived, xs, words, params, full, empty,
                            begin, end, run, M, N, KB, m_tiles, 2, PARTS, SHARED, BF16,
                            HAS_BIAS, HAS_RESIDUAL, PAIRED, GROUP, BM, BN, STAGES, PENDING, DEPENDENT)),
                (_consume, (out, bias, residual, partial, arrived, xs, words, params, full, empty,
                            begin, end, run, M, N, KB, m_tiles, 3, PARTS, SHARED, BF16,
                            HAS_BIAS, HAS_RESIDUAL, PAIRED, GROUP, BM, BN, STAGES, PENDING, DEPENDENT)),
                (_produce, (x_desc, word_desc, param_desc, xs, words, params, full, empty,
                            begin, end, N, KB, m_tiles, GROUP, BM, BN, STAGES, DEPENDENT)),
            ],
            [4, 4, 4, 1],
            [112, 112, 112, 40],
        )  # fmt: skip
    elif PARTS == 2:
        gl.warp_specialize(
            [
                (_consume, (out, bias, residual, partial, arrived, xs, words, params, full, empty,
                            begin, end, run, M, N, KB, m_tiles, 0, PARTS, SHARED, BF16,
                            HAS_BIAS, HAS_RESIDUAL, PAIRED, GROUP, BM, BN, STAGES, PENDING, DEPENDENT)),
                (_consume, (out, bias, residual, partial, arrived, xs, words, params, full, empty,
                            begin, end, run, M, N, KB, m_tiles, 1, PARTS, SHARED, BF16,
                            HAS_BIAS, HAS_RESIDUAL, PAIRED, GROUP, BM, BN, STAGES, PENDING, DEPENDENT)),
                (_produce, (x_desc, word_desc, param_desc, xs, words, params, full, empty,
                            begin, end, N, KB, m_tiles, GROUP, BM, BN, STAGES, DEPENDENT)),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (out, bias, residual, partial, arrived, xs, words, params, full, empty,
                            begin, end, run, M, N, KB, m_tiles, 0, PARTS, SHARED, BF16,
                            HAS_BIAS, HAS_RESIDUAL, PAIRED, GROUP, BM, BN, STAGES, PENDING, DEPENDENT)),
                (_produce, (x_desc, word_desc, param_desc, xs, words, params, full, empty,
                            begin, end, N, KB, m_tiles, GROUP, BM, BN, STAGES, DEPENDENT)),
            ],
            [1],
            [40],
        )  # fmt: skip


def operand_layouts() -> tuple[gl.NVMMASharedLayout, gl.NVMMASharedLayout, gl.NVMMASharedLayout]:
    """How x, words and params lie in shared memory: swizzled over 128 and 64 bytes, and plain."""
    return (
        gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2),
        gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2),
        gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1),
    )


def launch_wgmma(
    x: Tensor,
    weight: W4Weight,
    tile: WgmmaTile,
    multiprocessors: int,
    workspace: Workspace,
    out: Tensor,
    residual: Tensor | None = None,
    is_dependent: bool = False,
) -> None:
    """Write the product of x (M, K) and `weight` to out (M, out_features). Operands as `w4a16_linear` has checked them.

    x is copied where its rows overlap or do not start at multiples of 16 bytes.
    Raises ValueError for K that is no multiple of 8 or N that is none of 4: a bulk copy starts at multiples of 16 bytes.
    """
    tokens, cols = x.shape
    if cols % 8 or weight.rows % 4:
        raise ValueError(f"K = {cols}, N = {weight.rows}: w4_wgmma takes multiples of 8 and 4.")
    if x.data_ptr() % 16 or x.stride(0) % 8 or x.stride(0) < cols:
        x = x.clone(memory_format=torch.contiguous_format)
    plan = schedule(tokens, weight.rows, weight.blocks, tile, multiprocessors, tile.parts)
    dependent = tile.dependent if is_dependent else "never"
    options = {"num_warps": 4}
    if tile.parts == 1:
        options["maxnreg"] = 128  # two programs to a multiprocessor
    if dependent != "never":
        options["launch_pdl"] = True
    words = weight.words.view(-1, weight.words.shape[-1])
    params = weight.params.view(-1)
    x_layout, word_layout, param_layout = operand_layouts()
    w4_wgmma[(plan.programs,)](
        TensorDescriptor(x, [tokens, cols], [x.stride(0), 1], [tile.bm, BLOCK], x_layout),
        TensorDescriptor(words, list(words.shape), [words.shape[1], 1], [tile.bn, words.shape[1]], word_layout),
        TensorDescriptor(params, [params.numel()], [1], [tile.bn], param_layout),
        out, weight.bias, residual, workspace.partial, workspace.arrived,
        tokens, weight.rows, weight.blocks, plan.run,
        GROUP=weight.group_size, HAS_BIAS=weight.bias is not None, HAS_RESIDUAL=residual is not None,
        PAIRED=weight.is_paired,
        BM=tile.bm, BN=tile.bn, PARTS=tile.parts, STAGES=tile.stages_for(weight.group_size), PENDING=tile.pending,
        SHARED=plan.segments > 1, DEPENDENT=dependent, **options,
    )  # fmt: skip
