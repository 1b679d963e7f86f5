"""Statistics of a linear's inputs and the losses that need nothing else: tr(dW G dW^T), its held-out twin, its Cholesky factor.

M tokens, N out features, K in features, g group size, G = K / g groups. Knows no models and no search.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convert.errors import InputError
from kernels.products import linear, times_symmetric

EXCLUDED_MAX = 0.10  # share of tokens with a NaN or an infinity above which a run stops
HOLD_EVERY = 8  # every 8th sample is kept from the fit, to judge each step by
HELD_TOKENS = 1024  # fewer held-out tokens than these are too few to judge by


@dataclass(frozen=True)
class InputStatistics:
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

    def to(self, device: torch.device | str) -> "InputStatistics":
        """On the device; matrices that are one stay one."""
        gram = self.gram.to(device)
        fit, hold = (gram if part is self.gram else part.to(device) for part in (self.fit, self.hold))
        return replace(self, gram=gram, fit=fit, hold=hold, mean_abs=self.mean_abs.to(device))


class GramAccumulator:
    """Sums over the inputs of a linear, chunk by chunk: its Gram matrix, sizes of its channels, counts.

    Tokens with a NaN or an infinity are left out and counted. With `hold_out`, every HOLD_EVERY-th sample has a Gram matrix of
    its own. Gram sums are float32, sums of |x| float64.
    """

    def __init__(self, width: int, device: torch.device | str, *, hold_out: bool) -> None:
        """width: K."""
        count = 2 if hold_out else 1
        self._grams = [torch.zeros(width, width, device=device) for _ in range(count)]
        self._seen = [0] * count
        self._samples = 0
        self._sum_abs = torch.zeros(width, dtype=torch.float64, device=device)
        self.max_abs = torch.zeros(width, device=device)
        self.excluded = 0

    def add(self, chunk: Tensor) -> None:
        """Take in inputs (samples, L, K) in their own dtype."""
        if len(self._grams) == 1:
            self._add(0, chunk.flatten(0, 1))
            return
        numbers = torch.arange(self._samples, self._samples + len(chunk), device=chunk.device)
        held = numbers % HOLD_EVERY == HOLD_EVERY - 1
        self._samples += len(chunk)
        for k, rows in enumerate((~held, held)):
            self._add(k, chunk[rows].flatten(0, 1))

    def _add(self, k: int, x: Tensor) -> None:
        """x (M, K) into the k-th Gram matrix."""
        magnitude = x.abs()
        size = magnitude.sum(0, dtype=torch.float32)
        if not bool(size.isfinite().all()):
            finite = x.isfinite().all(-1)
            self.excluded += int((~finite).sum())
            x, magnitude = x[finite], magnitude[finite]
            size = magnitude.sum(0, dtype=torch.float32)
        if not len(x):
            return
        self._grams[k] += outer_sum(x, x)
        self._sum_abs += size
        self.max_abs = torch.maximum(self.max_abs, magnitude.amax(0).float())
        self._seen[k] += len(x)

    @property
    def tokens(self) -> int:
        """Tokens that were taken in."""
        return sum(self._seen)

    @property
    def gram_sum(self) -> Tensor:
        """X^T X (K, K) of all samples, not divided by the tokens."""
        return self._grams[0] if len(self._grams) == 1 else self._grams[0] + self._grams[1]

    @property
    def mean_abs(self) -> Tensor:
        """Mean |x| (K,) float32."""
        return (self._sum_abs / max(1, self.tokens)).float()

    def check(self, name: str) -> str:
        """A remark about tokens that were left out, empty where none were. Raises InputError where they are too many."""
        total = self.tokens + self.excluded
        text = f"{name}: {self.excluded} of {total} tokens hold NaN or Inf"
        if not self.tokens or self.excluded > EXCLUDED_MAX * total:
            raise InputError(
                f"{text} in their activations, more than {EXCLUDED_MAX:.0%}: the model overflows on this text. Use --dtype bfloat16 "
                "or float32, or check the weights of the layer before."
            )
        return f"{text}: left out." if self.excluded else ""

    def statistics(self, name: str) -> InputStatistics:
        """What the search reads, of the linear(s) `name`. Raises InputError as `check`."""
        self.check(name)
        gram = self.gram_sum / self.tokens
        fit = hold = gram
        if len(self._grams) == 2:
            seen, held = self._seen
            if seen >= HOLD_EVERY // 2 * held > 0 and held >= HELD_TOKENS:
                fit, hold = self._grams[0] / seen, self._grams[1] / held
        return InputStatistics(gram, fit, hold, self.mean_abs, self.tokens, self.excluded)


@contextmanager
def fast_products() -> Iterator[None]:
    """float32 products in TF32 on a GPU that has it: for sums of search and for learned rounding, never for Cholesky."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 products in float32: for factorizations inside `fast_products`."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def outer_sum(left: Tensor, right: Tensor) -> Tensor:
    """left^T right (A, B) float32 of (M, A) and (M, B): operands in their own dtype, sums in float32."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return linear(left.float().t(), right.float().t())


def observe(chunks: Iterable[Tensor], name: str) -> InputStatistics:
    """Statistics over chunks (samples, L, K) of the inputs of the linear(s) `name`. Raises InputError as `GramAccumulator.check`."""
    sums: GramAccumulator | None = None
    for chunk in chunks:
        sums = sums or GramAccumulator(chunk.shape[-1], chunk.device, hold_out=True)
        sums.add(chunk)
    if sums is None:
        raise InputError(f"{name}: there is no text to observe.")
    return sums.statistics(name)


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
        with exact_products():
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
        with exact_products():
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
