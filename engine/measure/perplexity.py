"""Perplexity over non-overlapping windows, KL divergence and top-1 agreement with a reference, one forward pass for both.

W windows of L tokens, H hidden size, V vocabulary. Protocol: the text is tokenized once, cut into windows of L tokens,
the tail dropped; in each window token i predicts token i + 1, so it has L - 1 predictions; PPL = exp(mean over windows
of the mean negative log-likelihood). Logits, softmax and sums are float32 (sums over windows float64).
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from convert.errors import InputError
from engine.measure.windows import (
    AttendFactory,
    EvalTokens,
    Progress,
    Tokenizer,
    cut_windows,
    forward_windows,
    tokenize,
)
from engine.model.attention import cached_attend, causal_attend
from engine.model.forward import Model
from engine.model.kv_simulation import KVSimulation
from engine.model.layers import dense_product

__all__ = [
    "EvalTokens",
    "PairedDifference",
    "PerplexityResult",
    "Reference",
    "Tokenizer",
    "Watch",
    "cut_windows",
    "forward_windows",
    "paired_difference",
    "perplexity",
    "perplexity_and_reference",
    "runs_cached",
    "student_t_975",
    "tokenize",
]

# Called with a window, a range of its predictions, and their log-probabilities (T, V) by the reference and by the model; both are
# overwritten afterwards.
Watch = Callable[[int, slice, Tensor, Tensor], None]

LOGITS_BYTES = {
    "cpu": 24 * 2**20,
    "cuda": 64 * 2**20,
}  # a chunk of float32 logits; a CPU keeps three in its cache


@dataclass(frozen=True)
class PerplexityResult:
    """One model on one text. `nll` and `kl_windows` hold the mean over each window's predictions, in nats."""

    ppl: float
    nll: tuple[float, ...]
    tokens: int
    windows: int
    seqlen: int
    bos: bool
    text: str
    text_digest: str
    tokenizer_digest: str
    dtype: str
    device: str
    kv_bits: int
    kv_mode: str | None
    kv_path: (
        Literal["cache", "simulated"] | None
    )  # through the cache's pages and kernels, or rounded on the spot
    seconds: float
    kl: float | None = None  # KL(reference || this), nats a token
    top1: float | None = None  # share of predictions whose likeliest token is the reference's
    kl_windows: tuple[float, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """A model's normed hidden states on the first windows, (L, H) each, and its head (V, H): logits are made again."""

    hidden: tuple[Tensor, ...]
    lm_head: Tensor
    ids: Tensor  # (W, L) the windows they belong to


@dataclass(frozen=True)
class PairedDifference:
    """PPL of b minus PPL of a, and its 95 % interval, from the differences of the windows' NLL (Student's t)."""

    difference: float
    low: float
    high: float


@torch.no_grad()
def perplexity(
    model: Model,
    tokens: EvalTokens,
    seqlen: int = 2048,
    *,
    windows: int | None = None,
    kv: KVSimulation | None = None,
    reference: Reference | None = None,
    make_attend: AttendFactory | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of `model` on the first `windows` windows (None: all) of `tokens`.

    Args:
        kv: what keys and values go through; None leaves them as they are. On a GPU, 8 bits are those of the real cache.
        reference: KL and top-1 agreement are measured on its windows, which must be the first of these.
        make_attend: attention of complete sequences to use instead; `kv` then only names what it does.

    Raises InputError for a text shorter than a window, or a loss that is not finite, naming the window.
    """
    return perplexity_and_reference(
        model,
        tokens,
        seqlen,
        keep=0,
        windows=windows,
        kv=kv,
        reference=reference,
        make_attend=make_attend,
        progress=progress,
    )[0]


@torch.no_grad()
def perplexity_and_reference(
    model: Model,
    tokens: EvalTokens,
    seqlen: int = 2048,
    *,
    keep: int,
    windows: int | None = None,
    kv: KVSimulation | None = None,
    reference: Reference | None = None,
    make_attend: AttendFactory | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> tuple[PerplexityResult, Reference]:
    """As `perplexity`, and the first `keep` windows as a reference for other models, from the same pass.

    Kept hidden states take keep * L * H elements of the model's dtype on its device.
    """
    started = time.perf_counter()
    cut = cut_windows(tokens, seqlen, model.config, windows)
    if reference is not None:
        _check_reference(reference, cut, model.lm_head.shape[0])
    nll: list[float] = []
    divergence: list[tuple[float, float]] = []
    kept: list[Tensor] = []
    uses_cache = kv is not None and make_attend is None and runs_cached(kv, model)
    if make_attend is None:
        make_attend = cached_attend(8, kv.params) if kv is not None and uses_cache else _torch_attend(kv)
    for hidden in forward_windows(model, cut, make_attend, progress):
        index = len(nll)
        is_compared = reference is not None and index < len(reference.hidden)
        loss, distance = _judge_window(
            model, hidden, cut[index].to(model.device), reference if is_compared else None, index, watch
        )
        nll.append(loss)
        if not math.isfinite(loss):
            raise InputError(
                f"The loss of window {index} is {loss}: the model's activations overflow in "
                f"{_name(model.dtype)} or its weights are damaged. Try --dtype float32 or bfloat16, or `quantize verify`."
            )
        if distance is not None:
            divergence.append(distance)
        if index < keep:
            kept.append(hidden.clone())
    result = PerplexityResult(
        ppl=math.exp(math.fsum(nll) / len(nll)),
        nll=tuple(nll),
        tokens=len(tokens.ids),
        windows=len(nll),
        seqlen=seqlen,
        bos=tokens.bos,
        text=tokens.text,
        text_digest=tokens.text_digest,
        tokenizer_digest=tokens.tokenizer_digest,
        dtype=_name(model.dtype),
        device=model.device.type,
        kv_bits=16 if kv is None else kv.bits,
        kv_mode=None if kv is None else kv.mode,
        kv_path=None if kv is None else "cache" if uses_cache else "simulated",
        seconds=time.perf_counter() - started,
        kl=math.fsum(kl for kl, _ in divergence) / len(divergence) if divergence else None,
        top1=math.fsum(top for _, top in divergence) / len(divergence) if divergence else None,
        kl_windows=tuple(kl for kl, _ in divergence),
    )
    return result, Reference(tuple(kept), model.lm_head, cut[: len(kept)])


def runs_cached(kv: KVSimulation, model: Model) -> bool:
    """True where the cache's kernels do what `kv` says: on a GPU, 8 bits, a head size that they take."""
    return model.device.type == "cuda" and kv.bits == 8 and model.config.head_dim in (32, 64, 128, 256)


def _torch_attend(kv: KVSimulation | None) -> AttendFactory:
    return lambda batch, length, config: causal_attend(batch, length, config, kv)


def paired_difference(a: PerplexityResult, b: PerplexityResult) -> PairedDifference:
    """PPL(b) - PPL(a) on the same windows. With d the mean difference of NLL and h the half-width of its 95 % interval:
    PPL(a) (exp(d -+ h) - 1). Raises InputError where texts, tokens or windows differ, or there is one window only."""
    same = ("text_digest", "tokenizer_digest", "seqlen", "windows", "bos")
    differing = [name for name in same if getattr(a, name) != getattr(b, name)]
    if differing:
        raise InputError(
            f"The two results differ in {', '.join(differing)}: only results on the same windows can be compared pairwise."
        )
    count = len(a.nll)
    if count < 2:
        raise InputError("An interval needs at least 2 windows: give a longer text or a smaller --seqlen.")
    differences = [y - x for x, y in zip(a.nll, b.nll, strict=True)]
    mean = math.fsum(differences) / count
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    half = student_t_975(count - 1) * math.sqrt(variance / count)
    low, middle, high = (a.ppl * math.expm1(mean + sign * half) for sign in (-1, 0, 1))
    return PairedDifference(middle, low, high)


def student_t_975(degrees: int) -> float:
    """97.5 % quantile of Student's t: exact for 1 and 2 degrees, else Abramowitz and Stegun 26.7.5 (error below 0.006)."""
    if degrees == 1:
        return math.tan(0.475 * math.pi)
    if degrees == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z, n = 1.959963984540054, degrees
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / n + second / n**2 + third / n**3 + fourth / n**4


def _judge_window(
    model: Model,
    hidden: Tensor,
    window: Tensor,
    reference: Reference | None,
    index: int,
    watch: Watch | None,
) -> tuple[float, tuple[float, float] | None]:
    """hidden (L, H), window (L,) -> mean NLL of its L - 1 predictions in nats; with a reference, also the mean of
    KL(reference || model) and the share of equal likeliest tokens. Each logit of the model is computed once."""
    count = len(window) - 1
    total = divergence = agree = 0.0
    step = _rows(model.lm_head.shape[0], model.device)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        ours = model.head(hidden[rows]).log_softmax(-1)
        targets = window[rows.start + 1 : rows.stop + 1]
        total -= ours.gather(1, targets[:, None]).double().sum().item()
        if reference is not None:
            theirs = dense_product(reference.hidden[index][rows], reference.lm_head, out_dtype=torch.float32)
            expected = theirs.to(ours.device).log_softmax(-1)
            if watch is not None:
                watch(index, rows, expected, ours)
            kl, equal = _divergence(expected, ours)
            divergence += kl
            agree += equal
    return total / count, None if reference is None else (divergence / count, agree / count)


def _divergence(expected: Tensor, ours: Tensor) -> tuple[float, float]:
    """Sum over rows of KL(expected || ours) in nats, and the rows whose likeliest token is the same.

    Both are log-probabilities (T, V), and both are overwritten.
    """
    agree = float((ours.argmax(-1) == expected.argmax(-1)).sum())
    excess = ours.sub_(expected)
    return -expected.exp_().mul_(excess).sum(-1).double().sum().item(), agree


def _rows(vocab_size: int, device: torch.device) -> int:
    return max(16, LOGITS_BYTES.get(device.type, LOGITS_BYTES["cuda"]) // (4 * vocab_size))


def _check_reference(reference: Reference, windows: Tensor, vocab_size: int) -> None:
    if reference.lm_head.shape[0] != vocab_size:
        raise InputError(
            f"The reference predicts {reference.lm_head.shape[0]} tokens and this model {vocab_size}: "
            "KL divergence needs one vocabulary."
        )
    count = len(reference.hidden)
    if count > len(windows) or not torch.equal(reference.ids, windows[:count]):
        raise InputError(
            "The reference was run on other windows: give both the same text, tokenizer and --seqlen."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
