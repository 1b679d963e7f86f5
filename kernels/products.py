"""float32 products on the CPU by oneDNN, which torch carries beside MKL; everything else is torch's own product.

Legend: M rows, N out features, K in features, G groups of g columns. MKL takes its 256-bit code on processors that are not
Intel's; oneDNN takes 512 bits wherever they are (one Zen 5 core: 220 instead of 100 GFLOP/s). Knows nothing of layers.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW_ROWS = 4  # below, and with a weight that stays in the cache, the call itself costs more than it spares
_LARGE_WEIGHT = 1 << 22
_CORE_BYTES_S, _CORE_FLOP_S = 25e9, 150e9  # what one core of a server reads and computes
_THREAD_S = 2e-4  # of work for each thread: waking one takes a quarter of that, and each product wakes it


@lru_cache(maxsize=1)
def _onednn() -> Any:
    """The operation behind oneDNN's dense product on plain tensors, or None where torch is built without it."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return None
    try:
        product = torch.ops.mkldnn._linear_pointwise
        x, weight, bias = torch.ones(4, 8), torch.ones(16, 8), torch.ones(16)
        is_right = bool((product(x, weight, bias, "none", [], "") == 9).all())
    except (AttributeError, RuntimeError, TypeError):  # a torch that lacks it or calls it otherwise
        return None
    return product if is_right else None


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or weight.ndim != 2:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    rows = x.numel() // max(1, x.shape[-1])
    if not weight.numel() or not rows or (rows < _FEW_ROWS and weight.numel() < _LARGE_WEIGHT):
        return False
    return x.shape[-1] == weight.shape[1] and _onednn() is not None


def prepacked(weight: Tensor) -> Tensor:
    """The weight (N, K) in oneDNN's own layout, for `linear` alone and without gradients; where there is none, as it is.

    Reads of few rows are then in order: half the time at M = 1 to 8. From M = 2 on, a row's bits do not depend on M.
    """
    is_float = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel()
    if weight.is_mkldnn or not is_float or _onednn() is None:
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias as `F.linear`: x (..., K), weight (N, K), bias (N,), any device and dtype -> (..., N).

    float32 operands on an x86 CPU that need no gradient go through oneDNN: sums in float32, in an order of its own.
    """
    if weight.is_mkldnn:
        product: Tensor = _onednn()(x.contiguous(), weight, bias, "none", [], "")
        return product
    if not _takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    product = _onednn()(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    return product


def times_symmetric(x: Tensor, square: Tensor) -> Tensor:
    """x square for symmetric square (K, K): (..., K) -> (..., K); for (G, g, g), each of x (G, n, g) by its own."""
    if square.ndim == 2:
        return linear(x, square)
    if not _takes_onednn(x[0], square[0]):
        return torch.matmul(x, square)
    return torch.stack([linear(part, own) for part, own in zip(x, square, strict=True)])


def threads_worth(rows: int, weight_elements: int) -> int:
    """Threads that a float32 product of M = rows with a weight of this size keeps busy, at least 1."""
    seconds = max(4 * weight_elements / _CORE_BYTES_S, 2 * rows * weight_elements / _CORE_FLOP_S)
    return max(1, int(seconds / _THREAD_S))


@contextmanager
def at_most_threads(count: int) -> Iterator[None]:
    """torch with no more than `count` threads on the CPU, and as many as before afterwards."""
    before = torch.get_num_threads()
    if count >= before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
