"""One token through a float weight, y = W x + b, at the speed of the memory: where cuBLAS reaches two thirds to nine tenths of it.

N rows of the weight, K in features. Knows nothing of layers. More than one token, and tensors on the CPU, are `F.linear`'s.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
BN, BK, WARPS = (
    8,
    512,
    4,
)  # 8 KB of weights a tile, two tiles under way, four or more programs on a multiprocessor


@triton.jit
def dense_gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    width,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[n] = sum_k w[n, k] x[k] + bias[n], or silu(gate[n]) * up[n] of rows n and n + `rows` (GATED).

    x (K,), weight (N, K) row-major, bias (N,): 16 bits; out (`rows`,) any float. Products and sums float32, one rounding
    (gate and up are rounded to the dtype of x before and after silu, as torch does). Tiles: BN rows (BN / 2 pairs) by BK.
    Ragged edges: rows past the last read row 0 and are not stored; k >= K are read as zero. The first tile of weights is
    loaded before the kernel waits for the one ahead of it.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = n < rows
    safe = tl.where(ok, n, 0).to(tl.int64)[:, None] * width
    k = tl.arange(0, BK)[None, :]
    first = weight_ptr + safe
    second = first + (tl.zeros([1, 1], tl.int64) + rows) * width
    w = tl.load(first + k, mask=k < width, other=0.0, eviction_policy="evict_first")
    if GATED:
        u = tl.load(second + k, mask=k < width, other=0.0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    zeros = tl.zeros([BN, 1], tl.int32)
    total = tl.zeros([BN, BK], tl.float32)
    total_up = tl.zeros([BN, BK], tl.float32)
    for start in range(0, width, BK):
        # x as a whole tile, each thread its own columns: no way through shared memory
        x = tl.load(x_ptr + zeros + start + k, mask=(zeros + start + k) < width, other=0.0).to(tl.float32)
        ahead = start + BK + k
        following = tl.load(first + ahead, mask=ahead < width, other=0.0, eviction_policy="evict_first")
        total += w.to(tl.float32) * x
        w = following
        if GATED:
            following = tl.load(second + ahead, mask=ahead < width, other=0.0, eviction_policy="evict_first")
            total_up += u.to(tl.float32) * x
            u = following
    y = tl.sum(total, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=ok, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(total_up, 1)
        if HAS_BIAS:
            up += tl.load(bias_ptr + rows + n, mask=ok, other=0.0).to(tl.float32)
        narrow = x_ptr.dtype.element_ty
        gate = y.to(narrow).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(narrow).to(tl.float32)
        y = silu * up.to(narrow).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=ok)


def dense_gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """f(x weight^T + bias), (1, N) of `out_dtype` (None: that of x); gated: silu(gate) * up, (1, N / 2), gate's rows first.

    x (1, K) and weight (N, K) fp16 or bf16, bias (N,). Starts before the kernel ahead of it has ended. On the CPU the
    torch reference runs. Raises ValueError where a shape or dtype does not fit.
    """
    if x.ndim != 2 or x.shape[0] != 1 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}: expected (1, K) and (N, K)."
        )
    if gated and weight.shape[0] % 2:
        raise ValueError(
            f"a gated weight has {weight.shape[0]} rows: expected gate's and up's, as many of each."
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(
            f"bias is {tuple(bias.shape)} {bias.dtype}, expected ({weight.shape[0]},) {x.dtype}."
        )
    if not x.is_cuda:
        return dense_gemv_reference(x, weight, bias, gated=gated, out_dtype=out_dtype)
    if x.dtype not in DTYPES or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} and weight {weight.dtype}: expected one 16-bit dtype, weight contiguous."
        )
    return launch_dense_gemv(x, weight, bias, gated, out_dtype or x.dtype)


def launch_dense_gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, out_dtype: torch.dtype, pdl: bool = True
) -> Tensor:
    """The kernel on operands that have been checked; for `dense_gemv`, and for the interpreter."""
    rows = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty(1, rows, dtype=out_dtype, device=x.device)
    bn = BN // 2 if gated else BN
    options = {"num_warps": WARPS, "enable_fp_fusion": True} | ({"launch_pdl": True} if pdl else {})
    dense_gemv_kernel[(triton.cdiv(rows, bn),)](
        x.contiguous(),
        weight,
        x if bias is None else bias,
        out,
        rows,
        weight.shape[1],
        GATED=gated,
        HAS_BIAS=bias is not None,
        BN=bn,
        BK=BK,
        PDL=pdl,
        **options,
    )
    return out


def dense_gemv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The same in torch, from float32 products."""
    wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if gated:
        gate, up = wide.to(x.dtype).float().chunk(2, -1)
        wide = F.silu(gate).to(x.dtype).float() * up
    return wide.to(out_dtype or x.dtype)
