"""Linear layers: `y = x W^T + b` over float or int4 weights. They know shapes and devices, not what they are for.

M tokens, N out features, K in features.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.checkpoint import LinearWeights
from kernels.int4 import Quantized

Linear = Callable[[Tensor], Tensor]  # (M, K) -> (M, N)


class DenseLinear:
    """A float product. weight (N, K), bias (N,), both in the compute dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def size_bytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


def dense_weight(weight: Tensor | Quantized, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The weight (N, K) as floats of `dtype`; differentiable where it is a tensor already."""
    if isinstance(weight, Quantized):
        return weight.to(device).dequantize(dtype)
    return weight.to(device=device, dtype=dtype)


def functional_linear(weights: LinearWeights, dtype: torch.dtype, device: torch.device | str) -> Linear:
    """The product with these tensors as they are, so that gradients reach them."""
    weight = dense_weight(weights.weight, dtype, device)
    bias = None if weights.bias is None else weights.bias.to(device=device, dtype=dtype)
    return lambda x: F.linear(x, weight, bias)


def make_linear(weights: LinearWeights, dtype: torch.dtype, device: torch.device | str) -> DenseLinear:
    """A layer for inference. On the CPU int4 weights become floats here, once: a dequantized product is faster there."""
    bias = None if weights.bias is None else weights.bias.to(device=device, dtype=dtype)
    return DenseLinear(dense_weight(weights.weight, dtype, device), bias)


def fuse_linears(parts: Sequence[LinearWeights]) -> LinearWeights | None:
    """Linears of one input as one product, rows in the order given; None where their formats differ.

    Rows of int4 weights are independent, so codes, scales and zeros are joined unchanged. A missing bias is zero.
    """
    weights = [part.weight for part in parts]
    bias = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat([_bias(part) for part in parts])
    floats = [w for w in weights if isinstance(w, Tensor)]
    quantized = [w for w in weights if isinstance(w, Quantized)]
    if len(floats) == len(weights):
        return LinearWeights(torch.cat(floats), bias)
    if len(quantized) < len(weights) or len({(w.group_size, w.bits) for w in quantized}) > 1:
        return None
    codes, scales, zeros = (
        torch.cat([getattr(w, name) for w in quantized]) for name in ("codes", "scales", "zeros")
    )
    return LinearWeights(Quantized(codes, scales, zeros, quantized[0].group_size, quantized[0].bits), bias)


def _bias(part: LinearWeights) -> Tensor:
    if part.bias is not None:
        return part.bias
    rows = part.weight.shape[0]
    return torch.zeros(rows, dtype=torch.float32)
