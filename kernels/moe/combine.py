# mypy: allow-untyped-defs, allow-incomplete-defs
"""The sum of what a token's experts give. T tokens, k experts of a token, H features."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["T"])
def sum_experts(parts, out, T, H, TOPK: tl.constexpr, BH: tl.constexpr):
    """out[t] = sum_j parts[t * TOPK + j]: parts (T * TOPK, H), out (T, H), one dtype; summed in float32 in the order of j."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.zeros([BH], tl.float32)
    for j in tl.static_range(TOPK):
        total += tl.load(parts + (token * TOPK + j) * H + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(out + token * H + h, total.to(out.dtype.element_ty), mask=h < H)


def launch_sum(parts: Tensor, out: Tensor, topk: int) -> None:
    """parts (T * topk, H) -> out (T, H)."""
    tokens, width = out.shape
    sum_experts[(tokens, triton.cdiv(width, 1024))](
        parts, out, tokens, width, TOPK=topk, BH=1024, num_warps=4
    )
