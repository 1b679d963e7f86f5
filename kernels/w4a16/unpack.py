# mypy: allow-untyped-defs, allow-incomplete-defs
"""Device code that every W4A16 kernel shares: nibbles to floats, the epilogue of a tile, dependent launch.

M tokens, N rows of the weight. A 4-bit code is put into the mantissa of a float of known exponent by one `lop3`
(mask and or), two codes at a time; subtracting the same exponent with the zero point in its mantissa is exact, so
(q - z) costs two instructions for two weights. The idea is that of Kim et al., "Who Says Elephants Can't Run" (2022).
`ASM = False` is the same arithmetic in plain operations, for the interpreter, which has no inline assembly.

fp16: planes 0 and 2 as 1024 + q (0x6400 | q), planes 1 and 3 as 64 + q (0x5400 | q << 4), with no shift for the nibble.
bf16: a 7-bit mantissa holds only 128 + q (0x4300 | q), so each plane is shifted down first.
"""

import triton
import triton.language as tl

DEPENDENT_MODES = ("never", "early", "waited", "late")
ASK = tl.constexpr(  # operands: address, bytes, number of addresses; thread i holds address i
    "{ .reg .pred p; .reg .b32 t; mov.b32 $0, 0; mov.u32 t, %tid.x; setp.lt.u32 p, t, $3;"
    " @p cp.async.bulk.prefetch.L2.global [$1], $2; }"
)
_F16 = "{{ .reg .b32 t; {shift} lop3.b32 t, {word}, {mask}, {magic}, 0xea; sub.rn.f16x2 $0, t, $2; }}"
_BF16 = (
    "{{ .reg .b32 t; {shift} lop3.b32 t, {word}, 0x000f000f, 0x43004300, 0xea; sub.rn.bf16x2 $0, t, $2; }}"
)


def check_dependent(mode: str) -> None:
    """Raise ValueError where `mode` does not say when a kernel lets the dependent launch behind it start."""
    if mode not in DEPENDENT_MODES:
        raise ValueError(f"dependent is {mode!r}; a tile takes one of {DEPENDENT_MODES}.")


def _f16(plane: int) -> str:
    mask, magic = ("0x000f000f", "0x64006400") if plane % 2 == 0 else ("0x00f000f0", "0x54005400")
    shift, word = ("shr.u32 t, $1, 8;", "t") if plane >= 2 else ("", "$1")
    return _F16.format(shift=shift, word=word, mask=mask, magic=magic)


def _bf16(plane: int) -> str:
    shift, word = (f"shr.u32 t, $1, {4 * plane};", "t") if plane else ("", "$1")
    return _BF16.format(shift=shift, word=word)


F16_PLANE = tl.constexpr(tuple(_f16(plane) for plane in range(4)))
BF16_PLANE = tl.constexpr(tuple(_bf16(plane) for plane in range(4)))
MUL_F16 = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")
MUL_BF16 = tl.constexpr("mul.rn.bf16x2 $0, $1, $2;")


@triton.jit
def ask_ahead(
    words, scale_zero, n0, b0, b1, N,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Ask for blocks b0 .. b0 + AHEAD - 1 (below b1) of rows n0 .. n0 + BN - 1 in L2. Waits for nothing.

    One bulk request for the words of a block (WIDTH elements a row, 64 bytes) and one for each group of params.
    """
    block = tl.minimum(b0 + tl.arange(0, AHEAD), b1 - 1).to(tl.int64)
    line = (words + (block * N + n0) * WIDTH).to(tl.int64)
    tl.inline_asm_elementwise(ASK, "=r,l,r,r", [line, BN * 64, AHEAD], dtype=tl.int32, is_pure=False, pack=1)
    if BN % 4 == 0:  # requests are of whole 16 bytes
        for group in tl.static_range(128 // GROUP):
            line = (scale_zero + (block * (128 // GROUP) + group) * N + n0).to(tl.int64)
            tl.inline_asm_elementwise(
                ASK, "=r,l,r,r", [line, BN * 4, AHEAD], dtype=tl.int32, is_pure=False, pack=1
            )


@triton.jit
def scale_of(scale_zero):
    """Scale of a scale_zero word, fp16."""
    return scale_zero.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def zero_of(scale_zero, PLANE: tl.constexpr, BF16: tl.constexpr):
    """The zero point of a scale_zero word in the mantissa that `centred` subtracts from plane PLANE, fp16 or bf16."""
    z = scale_zero >> 16
    if BF16:
        return (z | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif PLANE % 2 == 0:
        return (z | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return ((z << 4) | 0x5400).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def centred(words, zero, PLANE: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """q - z of nibble PLANE, exact. words int16, zero of the same shape from `zero_of`; result fp16 or bf16."""
    if ASM:
        if BF16:
            return tl.inline_asm_elementwise(
                BF16_PLANE[PLANE], "=r,r,r", [words, zero], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                F16_PLANE[PLANE], "=r,r,r", [words, zero], dtype=tl.float16, is_pure=True, pack=2
            )
    elif BF16:
        q = (((words >> (4 * PLANE)) & 15) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return (q.to(tl.float32) - zero.to(tl.float32)).to(tl.bfloat16)
    else:
        half = words >> 8 if PLANE >= 2 else words
        masked = (half & 0x0F) | 0x6400 if PLANE % 2 == 0 else (half & 0xF0) | 0x5400
        return masked.to(tl.int16).to(tl.float16, bitcast=True) - zero


@triton.jit
def times(a, b, BF16: tl.constexpr, ASM: tl.constexpr):
    """a * b, two at a time, rounded once to fp16 or bf16."""
    if ASM:
        if BF16:
            return tl.inline_asm_elementwise(
                MUL_BF16, "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                MUL_F16, "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
            )
    elif BF16:
        return (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16)
    else:
        return a * b


@triton.jit
def store_tile(
    acc, out, bias, residual, m, n0, M, N,
    BN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """Epilogue of a tile: out = round(f(acc + bias) + residual), f = identity, or silu(gate) * up for PAIRED.

    acc (BM, BN) float32 for tokens m (BM,) and rows n0 .. n0 + BN - 1; out and residual (M, N), or (M, N / 2) for
    PAIRED, row-major; bias (N,). All in float32, rounded once. Tokens >= M and rows >= N are not stored.
    """
    if HAS_BIAS:
        n = n0 + tl.arange(0, BN)
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if PAIRED:
        gate, up = tl.split(tl.reshape(acc, [acc.shape[0], BN // 2, 2]))
        value = gate / (1.0 + tl.exp(-gate)) * up
        column = n0 // 2 + tl.arange(0, BN // 2)
        width = N // 2
    else:
        value = acc
        column = n0 + tl.arange(0, BN)
        width = N
    offset = m[:, None] * width + column[None, :]
    mask = (m[:, None] < M) & (column[None, :] < width)
    if HAS_RESIDUAL:
        value += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask)
