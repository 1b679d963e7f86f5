"""Statistics of a linear's inputs and the losses that need nothing else: tr(dW G dW^T), its held-out twin, its Cholesky factor.

M tokens, N out features, K in features, g group size, G = K / g groups. Knows no models and no search.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.errors import InputError
from kernels.products import linear, times_symmetric

EXCLUDED_MAX = 0.10  # share of tokens with a NaN or an infinity above which a run stops
HOLD_EVERY = 8  # every 8th sample is kept from the fit, to judge each step by


@dataclass(frozen=True)
class InputStats:
    """What the search knows of the inputs X of a linear.

    gram: X^T X / M (K, K) float32 of all tokens; fit and hold: the same of the samples that steps are fitted on and
    judged by (both equal to gram where there are too few samples to split). A diagonal matrix may come as (K,).
    mean_abs: mean |x| (K,). tokens: M.
    excluded: tokens left out because they held a NaN or an infinity.
    """

    gram: Tensor
    fit: Tensor
    hold: Tensor
    mean_abs: Tensor
    tokens: int
    excluded: int = 0

    @property
    def dead(self) -> int:
        """Channels that were zero in every token."""
        return int((self.gram.diagonal() == 0).sum())


@contextmanager
def fast_products() -> Iterator[None]:
    """float32 products in TF32 on a GPU that has it: for sums of search and for learned rounding, never for Cholesky."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def outer_sum(left: Tensor, right: Tensor) -> Tensor:
    """left^T right (A, B) float32 of (M, A) and (M, B): operands in their own dtype, sums in float32."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return linear(left.float().t(), right.float().t())


def observe(chunks: Iterable[Tensor], name: str) -> InputStats:
    """Statistics over chunks (samples, L, K) of the inputs of the linear(s) `name`.

    Tokens with a NaN or an infinity are left out and counted; raises InputError above EXCLUDED_MAX of them.
    """
    parts: list[Tensor] = []  # fit, hold
    total = torch.zeros(0)
    seen = [0, 0]
    excluded = sample = 0
    for chunk in chunks:
        if not parts:
            cols = chunk.shape[-1]
            parts = [torch.zeros(cols, cols, device=chunk.device) for _ in range(2)]
            total = torch.zeros(cols, dtype=torch.float64, device=chunk.device)
        numbers = torch.arange(sample, sample + len(chunk), device=chunk.device)
        held = numbers % HOLD_EVERY == HOLD_EVERY - 1
        sample += len(chunk)
        for k, rows in enumerate((~held, held)):
            x = chunk[rows].flatten(0, 1)
            contribution = outer_sum(x, x)
            size = x.abs().sum(0, dtype=torch.float32)
            if not (contribution.isfinite().all() and size.isfinite().all()):
                finite = x.isfinite().all(-1)
                excluded += int((~finite).sum())
                x = x[finite]
                contribution = outer_sum(x, x)
                size = x.abs().sum(0, dtype=torch.float32)
            parts[k] += contribution
            total += size
            seen[k] += len(x)
    tokens = sum(seen)
    if not parts or excluded > EXCLUDED_MAX * (tokens + excluded) or not tokens:
        raise InputError(
            f"{name}: {excluded} of {tokens + excluded} tokens have a NaN or an infinity in their activations, more than "
            f"{EXCLUDED_MAX:.0%}. The weights or the compute dtype are unfit: try --dtype float32 or bfloat16."
        )
    fit, hold = parts
    gram = (fit + hold) / tokens
    split = seen[0] >= HOLD_EVERY // 2 * seen[1] > 0 and seen[1] >= 1024
    return InputStats(
        gram=gram,
        fit=fit / seen[0] if split else gram,
        hold=hold / seen[1] if split else gram,
        mean_abs=(total / tokens).float(),
        tokens=tokens,
        excluded=excluded,
    )


def from_sums(gram_sum: Tensor, mean_abs: Tensor, tokens: int) -> InputStats:
    """Statistics read back from a file: `gram_sum` is X^T X (K, K), not divided."""
    gram = gram_sum.float() / max(tokens, 1)
    return InputStats(gram, gram, gram, mean_abs.float(), tokens)


def loss_rows(delta: Tensor, gram: Tensor) -> Tensor:
    """Each row's share of tr(delta G delta^T): (N, K) and (K, K), or (K,) for a diagonal G -> (N,)."""
    if gram.ndim == 1:
        return torch.mv(delta.square(), gram)
    return times_symmetric(delta, gram).mul_(delta).sum(-1)


def diagonal_blocks(gram: Tensor, group_size: int) -> Tensor:
    """The blocks of G that couple the columns of one group: (K, K), or (K,) for a diagonal G -> (G, g, g)."""
    if gram.ndim == 1:
        return torch.diag_embed(gram.view(-1, group_size))
    groups = gram.shape[0] // group_size
    return (
        gram.view(groups, group_size, groups, group_size)
        .diagonal(dim1=0, dim2=2)
        .permute(2, 0, 1)
        .contiguous()
    )


def damped(gram: Tensor, damping: float) -> Tensor:
    """G with `damping` times its mean diagonal added to the diagonal; positive even for a matrix of zeros."""
    mean = gram.diagonal().mean().clamp(min=1e-12)
    return gram + torch.diag_embed((damping * mean).expand(gram.shape[0]))


def reversed_factors(gram: Tensor, damping: float) -> Iterator[tuple[Tensor, float]]:
    """L (K, K) with J G J = L L^T, J the reversal and G damped, for each rung of a ladder of dampings where there is one."""
    for step in (1, 3, 10, 30, 100, 1000):
        lower, info = torch.linalg.cholesky_ex(damped(gram, damping * step).flip(0, 1).contiguous())
        if not int(info):
            yield lower, damping * step


def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, float] | None:
    """Upper Cholesky factor U of the inverse of damped G (inverse = U^T U), rows divided by their diagonal.

    One factorization of the reversed matrix suffices: J G J = L L^T gives U = J L^-1 J, J the reversal.
    Returns U (K, K) float32 and the first damping that gives one, or None.
    """
    for lower, used in reversed_factors(gram, damping):
        eye = torch.eye(len(gram), device=gram.device)
        factor = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
        factor = factor / factor.diagonal()[:, None]
        if bool(factor.isfinite().all()):
            return factor.contiguous(), used
    return None


def unexplained(gram: Tensor, damping: float) -> Tensor | None:
    """The power of each column that the columns after it do not explain: (K, K) -> (K,), or None where G stays indefinite.

    These are the squared pivots L_jj^2, read backwards.
    """
    for lower, _ in reversed_factors(gram, damping):
        power = lower.diagonal().square().flip(0)
        if bool(power.isfinite().all()):
            return power
    return None
