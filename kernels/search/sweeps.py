"""Column sweeps of error-compensated rounding: GPTQ and integer coordinate descent, fused for the GPU, with torch references.

Legend: N out features, K in features, B columns of one sweep block. Everything is transposed, (K, N), so that one column of
the weight is one contiguous row and the N weights of a column go side by side. Rows of the weight never interact.
Knows nothing of groups, scales' origin or models: each weight arrives with its own scale and zero point.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installs: the torch references below do the work
    triton = None

_ROWS = 32  # weights of a column that one program holds; one warp, so that sums over the block stay inside it

_LAZY_BLOCKS = 8  # blocks of columns whose errors are spread over the rest together


def _block_size(cols: int) -> int:
    for size in (64, 32, 16):
        if cols % size == 0:
            return size
    raise ValueError(f"K = {cols} is not a multiple of 16: the column sweep needs whole blocks.")


def _span(cols: int, block: int, is_cuda: bool) -> int:
    """Columns after which what follows is updated by one product: on a GPU several blocks, so that it is read and written less often."""
    return min(_LAZY_BLOCKS * block, cols) if is_cuda else block


def _check(cols: int, rows: int, square: Tensor, *parts: Tensor) -> None:
    if tuple(square.shape) != (cols, cols):
        raise ValueError(
            f"The square operand has shape {tuple(square.shape)}, expected (K, K) = {(cols, cols)}."
        )
    for part in (square, *parts):
        if part.dtype != torch.float32 or not part.is_contiguous():
            raise ValueError(
                f"Expected contiguous float32 operands, found {part.dtype} {tuple(part.stride())}."
            )
    for part in parts:
        if tuple(part.shape) != (cols, rows):
            raise ValueError(f"An operand has shape {tuple(part.shape)}, expected (K, N) = {(cols, rows)}.")


def gptq_sweep(weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Round column after column and spread each error over the columns that follow (Frantar et al., GPTQ, 2022).

    For j = 0 .. K-1: r_j = clamp(round(w_j / s_j), -z_j, max_code - z_j); e_j = w_j - r_j s_j; w_i -= factor[j, i] e_j, i > j.

    Args:
        weight: (K, N) float32, columns in the order of the sweep; destroyed.
        factor: (K, K) float32, upper Cholesky factor of the inverse Hessian with each row divided by its diagonal.
        scale, zero: (K, N) float32, of every single weight.
    Returns centred codes r = q - z, (K, N) float32 holding integers. Rounds half to even; all arithmetic in float32.
    Raises ValueError when K is not a multiple of 16 or an operand has another shape, dtype or layout.
    """
    cols, rows = weight.shape
    _check(cols, rows, factor, weight, scale, zero)
    block = _block_size(cols)
    lower = factor.t().contiguous() if weight.is_cuda else factor
    codes = torch.empty_like(weight)
    span = _span(cols, block, weight.is_cuda)
    errors = torch.empty(span, rows, device=weight.device)
    for first in range(0, cols, span):
        last = min(first + span, cols)
        for start in range(first, last, block):
            end, part = start + block, errors[start - first : start - first + block]
            if weight.is_cuda:
                _gptq_block[(triton.cdiv(rows, _ROWS),)](
                    weight, lower, scale, zero, codes, part, start, rows, cols, max_code, BLOCK=block, ROWS=_ROWS, num_warps=1
                )  # fmt: skip
            else:
                _gptq_block_torch(weight, factor, scale, zero, codes, part, start, max_code)
            if end < last:
                weight[end:last].addmm_(factor[start:end, end:last].t(), part, alpha=-1)
        if last < cols:
            weight[last:].addmm_(factor[first:last, last:].t(), errors[: last - first], alpha=-1)
    return codes


def _gptq_block_torch(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor,
    codes: Tensor,
    errors: Tensor,
    start: int,
    max_code: int,
) -> None:
    """What `_gptq_block` does: the columns from `start` on, as many as `errors` has rows."""
    end = start + len(errors)
    for j in range(start, end):
        torch.div(weight[j], scale[j], out=codes[j])
        codes[j].clamp_(-zero[j], max_code - zero[j]).round_()
        torch.addcmul(weight[j], codes[j], scale[j], value=-1, out=errors[j - start])
        if j + 1 < end:
            weight[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - start], alpha=-1)


def descent_sweep(
    codes: Tensor, gradient: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, max_code: int
) -> None:
    """One sweep of exact integer coordinate descent on tr(D G D^T), D = w^ - w; updates codes and gradient in place.

    For j = 0 .. K-1: r_j' = clamp(round((r_j s_j - p_j / G_jj) / s_j), -z_j, max_code - z_j); p += G[:, j] (r_j' - r_j) s_j.

    Args:
        codes: (K, N) float32, centred codes r = q - z.
        gradient: (K, N) float32, p = G D^T, kept up to date.
        gram: (K, K) float32, symmetric with a positive diagonal.
        scale, zero: (K, N) float32, of every single weight.
    Raises ValueError as `gptq_sweep`.
    """
    cols, rows = codes.shape
    _check(cols, rows, gram, codes, gradient, scale, zero)
    block = _block_size(cols)
    inverse = 1 / gram.diagonal()
    steps = inverse.tolist() if not codes.is_cuda else []
    span = _span(cols, block, codes.is_cuda)
    moves = torch.empty(span, rows, device=codes.device)
    for first in range(0, cols, span):
        last = min(first + span, cols)
        for start in range(first, last, block):
            part = moves[start - first : start - first + block]
            if codes.is_cuda:
                _descent_block[(triton.cdiv(rows, _ROWS),)](
                    codes, gradient, gram, inverse, scale, zero, part, start, rows, cols, max_code,
                    BLOCK=block, ROWS=_ROWS, num_warps=1,
                )  # fmt: skip
            else:
                _descent_block_torch(codes, gradient, gram, steps, scale, zero, part, start, max_code)
            if span > block:  # inside the span at once, outside it once for all of its blocks
                gradient[first:last].addmm_(gram[first:last, start : start + block], part)
        outside = (slice(0, first), slice(last, cols)) if span > block else (slice(0, cols),)
        for rest in outside:
            if rest.start < rest.stop:
                gradient[rest].addmm_(gram[rest, first:last], moves[: last - first])


def _descent_block_torch(
    codes: Tensor,
    gradient: Tensor,
    gram: Tensor,
    steps: list[float],
    scale: Tensor,
    zero: Tensor,
    moves: Tensor,
    start: int,
    max_code: int,
) -> None:
    """What `_descent_block` does: the columns from `start` on, as many as `moves` has rows."""
    end = start + len(moves)
    local = gradient[start:end].clone()
    for j in range(start, end):
        old = codes[j]
        new = torch.addcdiv(old, local[j - start], scale[j], value=-steps[j])
        new.clamp_(-zero[j], max_code - zero[j]).round_()
        torch.mul(new - old, scale[j], out=moves[j - start])
        codes[j] = new
        if j + 1 < end:
            local[j + 1 - start :].addr_(gram[j, j + 1 : end], moves[j - start])


if triton is not None:

    @triton.jit
    def _round_half_even(x):  # type: ignore[no-untyped-def]
        return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: exact for |x| < 2^22, and x is at most 16 here

    @triton.jit
    def _gptq_block(  # type: ignore[no-untyped-def]
        weight_ptr, lower_ptr, scale_ptr, zero_ptr, code_ptr, error_ptr,
        start, rows, cols, max_code,
        BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """GPTQ inside one block of columns; left-looking, so that the tile of errors is all that a program keeps.

        x_j = w_j - sum over i < j of e_i factor[i, j]. Operands (K, N) float32 row-major, lower = factor^T (K, K);
        error (BLOCK, N). One program: ROWS weights of every column of the block; rows beyond N are masked.
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        mask = row < rows
        step = tl.arange(0, BLOCK)
        errors = tl.zeros((BLOCK, ROWS), dtype=tl.float32)
        for j in range(BLOCK):
            at = (start + j).to(tl.int64) * rows + row
            factor = tl.load(lower_ptr + (start + j).to(tl.int64) * cols + start + step)
            factor = tl.where(step < j, factor, 0.0)
            x = tl.load(weight_ptr + at, mask=mask, other=0.0) - tl.sum(errors * factor[:, None], axis=0)
            scale = tl.load(scale_ptr + at, mask=mask, other=1.0)
            zero = tl.load(zero_ptr + at, mask=mask, other=0.0)
            code = tl.minimum(tl.maximum(tl.div_rn(x, scale), -zero), max_code - zero)
            code = _round_half_even(code)
            error = x - code * scale
            tl.store(code_ptr + at, code, mask=mask)
            errors = tl.where((step == j)[:, None], error[None, :], errors)
        at = step[:, None].to(tl.int64) * rows + row[None, :]
        tl.store(error_ptr + at, errors, mask=mask[None, :])

    @triton.jit
    def _descent_block(  # type: ignore[no-untyped-def]
        code_ptr, gradient_ptr, gram_ptr, inverse_ptr, scale_ptr, zero_ptr, move_ptr,
        start, rows, cols, max_code,
        BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Coordinate descent inside one block of columns; layouts as in `_gptq_block`, moves (BLOCK, N) = (r' - r) s.

        p_j = gradient_j + sum over i < j of moves_i gram[i, j]; the gradient itself is updated by the caller.
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        mask = row < rows
        step = tl.arange(0, BLOCK)
        moves = tl.zeros((BLOCK, ROWS), dtype=tl.float32)
        for j in range(BLOCK):
            at = (start + j).to(tl.int64) * rows + row
            gram = tl.load(gram_ptr + (start + j).to(tl.int64) * cols + start + step)
            gram = tl.where(step < j, gram, 0.0)
            p = tl.load(gradient_ptr + at, mask=mask, other=0.0) + tl.sum(moves * gram[:, None], axis=0)
            scale = tl.load(scale_ptr + at, mask=mask, other=1.0)
            zero = tl.load(zero_ptr + at, mask=mask, other=0.0)
            old = tl.load(code_ptr + at, mask=mask, other=0.0)
            new = old - tl.div_rn(p * tl.load(inverse_ptr + start + j), scale)
            new = _round_half_even(tl.minimum(tl.maximum(new, -zero), max_code - zero))
            tl.store(code_ptr + at, new, mask=mask)
            moves = tl.where((step == j)[:, None], ((new - old) * scale)[None, :], moves)
        at = step[:, None].to(tl.int64) * rows + row[None, :]
        tl.store(move_ptr + at, moves, mask=mask[None, :])
