# mypy: allow-untyped-defs, allow-incomplete-defs
"""How `w4_wgmma` stores a tile: epilogue of sums out of registers, or of partial sums of several programs. Device code in Gluon.

M tokens, N rows of the weight, KB blocks along K. A warp group of 4 warps calls these for its ROWS rows of a tile. `wgmma` leaves neighbouring rows
in different lanes; `FLAT` has rows along the lanes, four of them in each where ROWS is 128, so that stores are of 8 bytes.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

CHUNK = gl.constexpr(16)  # tokens that move through shared memory at a time


@gluon.jit
def _epilogue(
    value, out, bias, residual, m0, n0, M, N,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """`store_tile` of w4a16_unpack for value (ROWS, TOKENS) float32, a warp's lanes along the rows n0 .., tokens m0 .."""
    ROWS: gl.constexpr = value.shape[0]
    TOKENS: gl.constexpr = value.shape[1]
    if HAS_BIAS:
        n = n0 + gl.arange(0, ROWS, gl.SliceLayout(1, value.type.layout))
        added = gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)
        value = value + gl.expand_dims(added, 1)
    if PAIRED:
        gate, up = gl.split(gl.permute(gl.reshape(value, [ROWS // 2, 2, TOKENS]), (0, 2, 1)))
        HALVED: gl.constexpr = gl.BlockedLayout([ROWS // 64, 1], [32, 1], [1, 4], [0, 1])
        result = gl.convert_layout(gate / (1.0 + gl.exp(-gate)) * up, HALVED)
        width = N // 2
        first = n0 // 2
    else:
        result = value
        width = N
        first = n0
    column = first + gl.arange(0, result.shape[0], gl.SliceLayout(1, result.type.layout))
    m = m0 + gl.arange(0, TOKENS, gl.SliceLayout(0, result.type.layout))
    offset = gl.expand_dims(m, 0) * width + gl.expand_dims(column, 1)
    mask = (gl.expand_dims(m, 0) < M) & (gl.expand_dims(column, 1) < width)
    if HAS_RESIDUAL:
        result = result + gl.load(residual + offset, mask=mask, other=0.0).to(gl.float32)
    gl.store(out + offset, result.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def finish(
    acc, out, bias, residual, m0, n0, M, N,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, PAIRED: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Store sums (ROWS, TOKENS) as `wgmma` leaves them, CHUNK tokens at a time through shared memory."""
    ROWS: gl.constexpr = acc.shape[0]
    if TOKENS > CHUNK:
        HALF: gl.constexpr = TOKENS // 2
        low, high = gl.split(gl.permute(gl.reshape(acc, [ROWS, 2, HALF]), (0, 2, 1)))
        finish(low, out, bias, residual, m0, n0, M, N, HAS_BIAS, HAS_RESIDUAL, PAIRED, HALF)
        finish(high, out, bias, residual, m0 + HALF, n0, M, N, HAS_BIAS, HAS_RESIDUAL, PAIRED, HALF)
    else:
        value = gl.convert_layout(acc, gl.BlockedLayout([ROWS // 32, 1], [32, 1], [1, 4], [0, 1]))
        _epilogue(value, out, bias, residual, m0, n0, M, N, HAS_BIAS, HAS_RESIDUAL, PAIRED)


@gluon.jit
def merge(
    partial, out, bias, residual, first, last, tile, run, m0, n0, M, N, KB, PART: gl.constexpr, PARTS: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, PAIRED: gl.constexpr, ROWS: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """Store the sum, in the order of k, of what programs first .. last - 1 have left for a tile, two loaded side by side."""
    FLAT: gl.constexpr = gl.BlockedLayout([ROWS // 32, 1], [32, 1], [1, 4], [0, 1])
    TOKENS: gl.constexpr = 8192 // ROWS if 8192 // ROWS < BM else BM
    row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, FLAT)), 1)
    token = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, FLAT)), 0)
    for start in range(0, BM, TOKENS):
        value = gl.zeros([ROWS, TOKENS], gl.float32, FLAT)
        inner = (start + token) * ROWS + row
        for program in range(first, last, 2):
            slot = (program * 2 + (tile != program * run // KB).to(gl.int32)) * PARTS + PART
            more = ((program + 1) * 2 + (tile != (program + 1) * run // KB).to(gl.int32)) * PARTS + PART
            live = gl.full([ROWS, TOKENS], program + 1, gl.int32, FLAT) < last
            one = gl.load(partial + slot * (ROWS * BM) + inner, cache_modifier=".cg")
            two = gl.load(partial + more * (ROWS * BM) + inner, mask=live, other=0.0, cache_modifier=".cg")
            value = value + one + two
        _epilogue(value, out, bias, residual, m0 + start, n0, M, N, HAS_BIAS, HAS_RESIDUAL, PAIRED)
