"""Elementwise work of learned rounding, fused for the GPU, with torch references: the quantizer with its gradient, and Adam.

Legend: R groups, g group size, n elements of a parameter. A block of a 7B model has 200 M weights: what is read and written for
each of them in a step decides its time. Knows no loss.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installs: the torch references below do the work
    triton = None

_ROWS = 16  # groups of one program
_BLOCK = 1024  # elements of one program of Adam
_EPSILON = 1e-20


def round_to_grid(latent: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """clamp(round(v), -z, Q - z) * s: latent v (R, g), scale and zero (R, 1), all float32 -> (R, g). Rounds half to even."""
    if not _is_fused(latent):
        return torch.clamp(latent.round(), -zero, max_code - zero) * scale
    out = torch.empty_like(latent)
    groups, size = latent.shape
    _round_kernel[(triton.cdiv(groups, _ROWS),)](
        latent, scale.contiguous(), zero.contiguous(), out, groups, max_code, GROUP=size, ROWS=_ROWS, num_warps=4
    )  # fmt: skip
    return out


def round_to_grid_backward(
    grad: Tensor, latent: Tensor, scale: Tensor, zero: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `round_to_grid`, straight through: dv = dw * s where nothing was clamped (R, g), ds = sum of dw * r (R, 1)."""
    if not _is_fused(latent):
        rounded = latent.round()
        codes = torch.clamp(rounded, -zero, max_code - zero)
        return grad * scale * (rounded == codes), (grad * codes).sum(-1, keepdim=True)
    grad_latent, grad_scale = torch.empty_like(latent), torch.empty_like(scale)
    groups, size = latent.shape
    _round_backward_kernel[(triton.cdiv(groups, _ROWS),)](
        grad.contiguous(), latent, scale.contiguous(), zero.contiguous(), grad_latent, grad_scale,
        groups, max_code, GROUP=size, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return grad_latent, grad_scale


def adam_step(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor,
    schedule: Tensor,
    rate: float,
    betas: tuple[float, float],
    mean: Tensor | None = None,
    average: float = 0.0,
) -> None:
    """One update of Adam (Kingma and Ba, 2014), in place: param, first and second moment, and a running mean of the parameter.

    m += (1 - b1) (g - m); v = b2 v + (1 - b2) g^2; p -= rate schedule (m / c1) / (sqrt(v / c2) + 1e-20); mean += (1 - a) (p - mean).

    Args:
        param, grad, first, second, mean: float32 of one shape, contiguous on a GPU. bias: (c1, c2) of this step; schedule: (1,).
    """
    if not _is_fused(param):
        first.lerp_(grad, 1 - betas[0])
        second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        param.sub_((first / bias[0]) / ((second / bias[1]).sqrt() + _EPSILON) * (schedule * rate))
        if mean is not None:
            mean.lerp_(param, 1 - average)
        return
    size = param.numel()
    _adam_kernel[(triton.cdiv(size, _BLOCK),)](
        param, grad.contiguous(), first, second, param if mean is None else mean, bias, schedule,
        size, rate, 1 - betas[0], betas[1], 1 - average, EPSILON=_EPSILON, HAS_MEAN=mean is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def _is_fused(tensor: Tensor) -> bool:
    """Whether a kernel does the work: contiguous float32 on a GPU."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and tensor.is_contiguous()


if triton is not None:

    @triton.jit
    def _round_half_even(x):  # type: ignore[no-untyped-def]
        return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: exact for |x| < 2^22

    @triton.jit
    def _round_kernel(  # type: ignore[no-untyped-def]
        latent_ptr, scale_ptr, zero_ptr, out_ptr, groups, max_code, GROUP: tl.constexpr, ROWS: tl.constexpr
    ):  # fmt: skip
        """One program: ROWS groups; formula in `round_to_grid`. All float32, (R, g) row-major and (R,); groups beyond R are masked."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * GROUP + tl.arange(0, GROUP)[None, :]
        mask = row < groups
        scale = tl.load(scale_ptr + row, mask=mask, other=1.0)
        zero = tl.load(zero_ptr + row, mask=mask, other=0.0)
        code = _round_half_even(tl.load(latent_ptr + at, mask=mask[:, None], other=0.0))
        code = tl.minimum(tl.maximum(code, -zero[:, None]), max_code - zero[:, None])
        tl.store(out_ptr + at, code * scale[:, None], mask=mask[:, None])

    @triton.jit
    def _round_backward_kernel(  # type: ignore[no-untyped-def]
        grad_ptr, latent_ptr, scale_ptr, zero_ptr, grad_latent_ptr, grad_scale_ptr,
        groups, max_code, GROUP: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Gradients of `_round_kernel`, layouts as there; the sum over a group is taken in float32."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * GROUP + tl.arange(0, GROUP)[None, :]
        mask = row < groups
        scale = tl.load(scale_ptr + row, mask=mask, other=1.0)
        zero = tl.load(zero_ptr + row, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + at, mask=mask[:, None], other=0.0)
        rounded = _round_half_even(tl.load(latent_ptr + at, mask=mask[:, None], other=0.0))
        code = tl.minimum(tl.maximum(rounded, -zero[:, None]), max_code - zero[:, None])
        inside = tl.where(rounded == code, grad * scale[:, None], 0.0)
        tl.store(grad_latent_ptr + at, inside, mask=mask[:, None])
        tl.store(grad_scale_ptr + row, tl.sum(grad * code, axis=1), mask=mask)

    @triton.jit
    def _adam_kernel(  # type: ignore[no-untyped-def]
        param_ptr, grad_ptr, first_ptr, second_ptr, mean_ptr, bias_ptr, schedule_ptr,
        size, rate, fresh, decay, fresh_mean,
        EPSILON: tl.constexpr, HAS_MEAN: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK elements; formula in `adam_step`. All float32; fresh = 1 - b1, decay = b2, fresh_mean = 1 - a."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < size
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
        first = tl.load(first_ptr + at, mask=mask, other=0.0)
        second = tl.load(second_ptr + at, mask=mask, other=0.0)
        param = tl.load(param_ptr + at, mask=mask, other=0.0)
        first += fresh * (grad - first)
        second = second * decay + (1.0 - decay) * grad * grad
        step = tl.load(schedule_ptr) * rate
        move = (first / tl.load(bias_ptr)) / (tl.sqrt(second / tl.load(bias_ptr + 1)) + EPSILON)
        param -= move * step
        tl.store(first_ptr + at, first, mask=mask)
        tl.store(second_ptr + at, second, mask=mask)
        tl.store(param_ptr + at, param, mask=mask)
        if HAS_MEAN:
            mean = tl.load(mean_ptr + at, mask=mask, other=0.0)
            tl.store(mean_ptr + at, mean + fresh_mean * (param - mean), mask=mask)
