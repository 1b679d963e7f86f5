"""Choice of the range of each quantization group from a list of shrink factors, fused for the GPU, with a torch reference.

Legend: N out features, K in features, g group size, G = K / g groups, C candidates of column scales, P pairs of shrink factors.
Knows nothing of models or of where the Gram matrix comes from.
"""

import torch
from torch import Tensor

from kernels.int4 import SCALE_MAX, SCALE_MIN, qparams
from kernels.products import times_symmetric

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installs: the torch reference below does the work
    triton = None

_TILE_ELEMENTS = (
    1 << 17
)  # weights that the torch reference works on at a time, so that they stay in the cache


_ROWS = 64  # of a program: what one tensor-core product of a warp group takes


def warps(group_size: int) -> int:
    """Warps of a program: a tile of 64 x 128 needs the registers of two warp groups."""
    return 8 if group_size >= 128 else 4


def choose_ranges(
    weight: Tensor,
    column_scale: Tensor,
    gram_blocks: Tensor,
    pairs: Tensor,
    bits: int,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Best pair of shrink factors of each (candidate, row, group), by the group's own block of the Gram matrix.

    For w = weight * column_scale, range [a min(w), b max(w)] for each pair (a, b), d = w^ - w:
    loss = (d / column_scale)^T Gram_block (d / column_scale), the smallest wins; ties go to the earlier pair.

    Args:
        weight: (N, K) float32. column_scale: (C, K) float32, positive. gram_blocks: (G, g, g) float32.
        pairs: (P, 2) float32, shrink factors of the low and the high end; the first should be (1, 1).
        symmetric: the zero point stays in the middle of the codes (`kernels.int4`).
    Returns the index of the pair (C, N, G) int64 and its loss (C, N, G) float32. The GPU multiplies in TF32.
    Raises ValueError on shapes that do not fit, and on groups that are not 16, 32, 64 or 128 on the GPU.
    """
    rows, cols = weight.shape
    groups, size, _ = gram_blocks.shape
    if groups * size != cols or column_scale.shape[-1] != cols:
        raise ValueError(
            f"K = {cols}, but the Gram blocks cover {groups} x {size} and the scales {column_scale.shape[-1]} columns."
        )
    if not weight.is_cuda:
        return _choose_ranges_torch(weight, column_scale, gram_blocks, pairs, bits, symmetric)
    if size not in (16, 32, 64, 128):
        raise ValueError(f"Groups of {size}: the GPU kernel reads 16, 32, 64 or 128.")
    count = column_scale.shape[0]
    index = torch.empty(count, rows, groups, dtype=torch.int32, device=weight.device)
    loss = torch.empty(count, rows, groups, dtype=torch.float32, device=weight.device)
    _choose_ranges_kernel[(triton.cdiv(rows, _ROWS), groups, count)](
        weight.contiguous(), column_scale.contiguous(), gram_blocks.contiguous(), pairs.contiguous(), index, loss,
        rows, cols, groups, pairs.shape[0], 2**bits - 1, SCALE_MIN, SCALE_MAX,
        GROUP=size, ROWS=_ROWS, SYMMETRIC=symmetric, num_warps=warps(size),
    )  # fmt: skip
    return index.long(), loss


def _choose_ranges_torch(
    weight: Tensor, column_scale: Tensor, gram_blocks: Tensor, pairs: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    groups, size, _ = gram_blocks.shape
    count, max_code = column_scale.shape[0], 2**bits - 1
    index = torch.zeros(count, rows, groups, dtype=torch.int64, device=weight.device)
    loss = torch.full((count, rows, groups), float("inf"), device=weight.device)
    tile = max(1, _TILE_ELEMENTS // cols)
    for c in range(count):
        scale_c = column_scale[c].view(groups, 1, size)
        gram = gram_blocks / scale_c / scale_c.transpose(1, 2)
        for start in range(0, rows, tile):
            part = weight[start : start + tile]
            w = (
                (part * column_scale[c]).view(len(part), groups, size).transpose(0, 1).contiguous()
            )  # (G, n, g)
            low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
            best = loss[c, start : start + tile]
            chosen = index[c, start : start + tile]
            for p, (a, b) in enumerate(pairs.tolist()):
                scale, zero = qparams(low * a, high * b, bits, symmetric)
                d = (w / scale).clamp_(-zero, max_code - zero).round_().mul_(scale).sub_(w)
                value = times_symmetric(d, gram).mul_(d).sum(-1).t()  # (n, G)
                chosen.masked_fill_(value < best, p)
                torch.minimum(best, value, out=best)
    return index, loss


if triton is not None:

    @triton.jit
    def _choose_ranges_kernel(  # type: ignore[no-untyped-def]
        weight_ptr, column_scale_ptr, gram_ptr, pair_ptr, index_ptr, loss_ptr,
        rows, cols, groups, pairs, max_code, scale_min, scale_max,
        GROUP: tl.constexpr, ROWS: tl.constexpr, SYMMETRIC: tl.constexpr,
    ):  # fmt: skip
        """One program: ROWS rows of one group under one candidate, all pairs in registers; formula in `choose_ranges`.

        weight (N, K), column_scale (C, K), gram (G, g, g), pair (P, 2), float32 row-major; index int32 and loss float32
        (C, N, G). Scales are rounded to fp16 before use; products with the Gram block in TF32; rows beyond N are masked.
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        group = tl.program_id(1)
        candidate = tl.program_id(2).to(tl.int64)
        lane = tl.arange(0, GROUP)
        mask = row < rows
        column_scale = tl.load(column_scale_ptr + candidate * cols + group * GROUP + lane)
        at = row[:, None].to(tl.int64) * cols + group * GROUP + lane[None, :]
        w = tl.load(weight_ptr + at, mask=mask[:, None], other=0.0) * column_scale[None, :]
        square = lane[:, None] * GROUP + lane[None, :]
        gram = tl.load(gram_ptr + group.to(tl.int64) * GROUP * GROUP + square)
        gram = gram / column_scale[:, None] / column_scale[None, :]
        low = tl.minimum(tl.min(w, axis=1), 0.0)
        high = tl.maximum(tl.max(w, axis=1), 0.0)
        best = tl.full((ROWS,), float("inf"), dtype=tl.float32)
        chosen = tl.zeros((ROWS,), dtype=tl.int32)
        for p in range(pairs):
            a = low * tl.load(pair_ptr + 2 * p)
            b = high * tl.load(pair_ptr + 2 * p + 1)
            if SYMMETRIC:
                middle = (max_code + 1) * 0.5
                scale = tl.maximum(tl.div_rn(-a, middle + 0.5), tl.div_rn(b, middle - 0.5))
                scale = tl.minimum(tl.maximum(scale, scale_min), scale_max).to(tl.float16).to(tl.float32)
                zero = tl.zeros((ROWS,), dtype=tl.float32) + middle
            else:
                scale = tl.div_rn(b - a, max_code * 1.0)
                scale = tl.minimum(tl.maximum(scale, scale_min), scale_max).to(tl.float16).to(tl.float32)
                zero = tl.minimum(tl.div_rn(-a, scale), max_code * 1.0)
                zero = (zero + 12582912.0) - 12582912.0
            # a tie may fall to the other side: one range is as good as the other there
            code = w * tl.div_rn(1.0, scale)[:, None]
            code = tl.minimum(tl.maximum(code, -zero[:, None]), max_code - zero[:, None])
            code = (code + 12582912.0) - 12582912.0
            d = code * scale[:, None] - w
            value = tl.sum(tl.dot(d, gram, input_precision="tf32") * d, axis=1)
            better = value < best
            best = tl.where(better, value, best)
            chosen = tl.where(better, p, chosen)
        out = (candidate * rows + row) * groups + group
        tl.store(index_ptr + out, chosen, mask=mask)
        tl.store(loss_ptr + out, best, mask=mask)
