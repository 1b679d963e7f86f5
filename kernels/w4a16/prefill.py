# mypy: allow-untyped-defs, allow-incomplete-defs
"""W4A16 product of many tokens: write slices of the weight as fp16 or bf16, multiply them with cuBLAS.

M tokens, N rows of the weight, K in features. The arithmetic of a large M hides the extra pass over the weight, and
a slice is small enough to be still in the L2 cache when cuBLAS reads it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.w4a16.layout import BLOCK, W4Weight
from kernels.w4a16.unpack import centred, scale_of, times, zero_of


@triton.jit
def w4_dequantize(
    words, scale_zero, out,
    N, K, row0, rows,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out[i, k] = (q[n, k] - z[n, g]) * s[n, g], n = row0 + i, i < rows.

    words (KB, N, 32) int16 and scale_zero (KB * P, N) int32 of `w4a16_layout`; out (rows, K) fp16 or bf16, row-major.
    Rounding: one, of the product to the dtype of out (for bf16 also of s). Tiles: BN rows by one block of 128 k.
    Ragged edges: rows >= `rows` and k >= K are not stored.
    """
    BF16: tl.constexpr = out.dtype.element_ty == tl.bfloat16
    b = tl.program_id(0)
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    n = tl.minimum(row0 + i, N - 1)
    c = tl.arange(0, 32)
    w = tl.load(words + (b * N + n[:, None]) * 32 + c[None, :], eviction_policy="evict_first")
    target = out + i[:, None].to(tl.int64) * K + b * 128 + c[None, :]
    for plane in tl.static_range(4):
        if plane * 32 % GROUP == 0:
            packed = tl.load(scale_zero + (b * (128 // GROUP) + plane * 32 // GROUP) * N + n)
            scale = scale_of(packed)
            factor = scale.to(tl.float32).to(tl.bfloat16) if BF16 else scale
        zero, _ = tl.broadcast(zero_of(packed, plane, BF16)[:, None], w)
        value = centred(w, zero, plane, BF16, ASM)
        wide, _ = tl.broadcast(factor[:, None], value)
        value = times(value, wide, BF16, ASM)
        if EVEN_K:
            tl.store(target + plane * 32, value, mask=(i < rows)[:, None])
        else:
            inside = (b * 128 + plane * 32 + c) < K
            tl.store(target + plane * 32, value, mask=(i < rows)[:, None] & inside[None, :])


@triton.jit
def silu_pairs(pairs, out, size, BLOCK: tl.constexpr):
    """out[i] = silu(pairs[2 i]), rounded, * pairs[2 i + 1] for i < size; pairs and out fp16 or bf16, contiguous; float32 inside."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    both = start * 2 + tl.arange(0, 2 * BLOCK)
    gate, up = tl.split(tl.reshape(tl.load(pairs + both, mask=both < 2 * size, other=0.0), (BLOCK, 2)))
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    i = start + tl.arange(0, BLOCK)
    tl.store(out + i, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=i < size)


@dataclass(frozen=True)
class PrefillTile:
    """How many rows are written out at a time; 0 for all at once."""

    rows: int


def launch_dequantize(weight: W4Weight, row0: int, out: Tensor) -> None:
    """Rows row0 .. row0 + out.shape[0] - 1 of the weight, in kernel order, to out (rows, K) fp16 or bf16."""
    rows = out.shape[0]
    w4_dequantize[(weight.blocks, triton.cdiv(rows, 64))](
        weight.words, weight.params, out, weight.rows, weight.in_features, row0, rows,
        GROUP=weight.group_size, EVEN_K=weight.in_features % BLOCK == 0, BN=64,
        ASM=not triton.knobs.runtime.interpret, num_warps=4,
    )  # fmt: skip


def launch_silu_pairs(pairs: Tensor, out: Tensor) -> None:
    """silu(gate) * up of a paired product (M, 2 I), whose columns alternate, to out (M, I), as one pass."""
    block = 1024
    silu_pairs[(triton.cdiv(out.numel(), block),)](pairs, out, out.numel(), BLOCK=block, num_warps=4)


def dequantize_then_matmul(x: Tensor, weight: W4Weight, tile: PrefillTile, out: Tensor) -> None:
    """x (M, K) times the weight to out (M, N), no epilogue: weights rounded to the dtype of x, sums in float32 (cuBLAS)."""
    step = tile.rows or weight.rows
    scratch = torch.empty(min(step, weight.rows), weight.in_features, dtype=x.dtype, device=x.device)
    for row0 in range(0, weight.rows, step):
        part = scratch[: min(step, weight.rows - row0)]
        launch_dequantize(weight, row0, part)
        torch.mm(x, part.t(), out=out[:, row0 : row0 + part.shape[0]])
