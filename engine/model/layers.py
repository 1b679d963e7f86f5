"""Linear layers: `y = x W^T + b` over float or int4 weights. They know shapes and devices, not what they are for.

M tokens, N out features, K in features, I intermediate size. On a GPU int4 weights stay packed and the kernels of
`kernels/w4a16/product.py` read them; on the CPU they become floats once, when the layer is made: the product is faster there.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from convert.checkpoint import LinearWeights
from convert.config import Activation
from kernels.int4 import Quantized
from kernels.products import linear, prepacked

if TYPE_CHECKING:
    from kernels.w4a16.product import W4Weight


class Linear(Protocol):
    """(M, K) -> (M, N)."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


class Layer(Linear, Protocol):
    """A linear made for inference, which owns its weights."""

    @property
    def size_bytes(self) -> int: ...


class DenseLinear:
    """A float product. weight (N, K), bias (N,), both in the compute dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return dense_product(x, self.weight, self.bias)

    def pack(self) -> None:
        """Lay the weight out for few rows on the CPU, where torch can; nothing but this layer reads it any more."""
        self.weight = prepacked(self.weight)

    @property
    def size_bytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


class DenseGated(DenseLinear):
    """act(gate) * up of one product with gate's rows first: (M, K) -> (M, I)."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, gated_mul: Callable[[Tensor], Tensor], name: Activation
    ) -> None:
        super().__init__(weight, bias)
        self._gated_mul, self._is_silu = gated_mul, name == "silu"

    def __call__(self, x: Tensor) -> Tensor:
        if self._is_silu and _takes_gemv(x, self.weight):
            return _gemv()(x, self.weight, self.bias, gated=True)
        return self._gated_mul(linear(x, self.weight, self.bias))


def dense_product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x weight^T + bias in `out_dtype` (None: that of x); a single token on a GPU goes through our own kernel."""
    if _takes_gemv(x, weight):
        return _gemv()(x, weight, bias, out_dtype=out_dtype)
    product = linear(x, weight, bias)
    return product if out_dtype is None else product.to(out_dtype)


def _takes_gemv(x: Tensor, weight: Tensor) -> bool:
    """Whether a float product goes through our own kernel: one token on a GPU, no gradient, operands that the kernel takes."""
    if not x.is_cuda or x.shape[0] != 1 or (torch.is_grad_enabled() and x.requires_grad):
        return False
    from kernels.block.dense_gemv import takes

    return takes(x, weight)


@lru_cache(maxsize=1)
def _gemv() -> Callable[..., Tensor]:
    from kernels.block.dense_gemv import dense_gemv

    return dense_gemv


class Int4Linear:
    """A product that reads packed int4 weights on a GPU; of paired gate and up rows, silu(gate) * up."""

    def __init__(self, weights: LinearWeights, up: LinearWeights | None, device: torch.device | str) -> None:
        from kernels.w4a16.product import pair, w4a16_linear

        self.weight = pack_int4(weights, device)
        if up is not None:
            self.weight = pair(self.weight, pack_int4(up, device))
        self._product = w4a16_linear

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self.weight, is_dependent=True)

    @property
    def size_bytes(self) -> int:
        return self.weight.size_bytes + (0 if self.weight.bias is None else self.weight.bias.nbytes)


class Int4Gated:
    """act(gate) * up of one int4 product with gate's rows first, for activations that the kernel does not have."""

    def __init__(
        self, weights: LinearWeights, gated_mul: Callable[[Tensor], Tensor], device: torch.device | str
    ) -> None:
        self._product, self._gated_mul = Int4Linear(weights, None, device), gated_mul

    def __call__(self, x: Tensor) -> Tensor:
        return self._gated_mul(self._product(x))

    @property
    def size_bytes(self) -> int:
        return self._product.size_bytes


def dense_weight(weight: Tensor | Quantized, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The weight (N, K) as floats of `dtype`; differentiable where it is a tensor already."""
    if isinstance(weight, Quantized):
        return weight.to(device).dequantize(dtype)
    return weight.to(device=device, dtype=dtype)


def functional_linear(weights: LinearWeights, dtype: torch.dtype, device: torch.device | str) -> Linear:
    """The product with these tensors as they are, so that gradients reach them."""
    weight = dense_weight(weights.weight, dtype, device)
    bias = None if weights.bias is None else weights.bias.to(device=device, dtype=dtype)
    return lambda x: linear(x, weight, bias)


def why_unpacked(group_size: int, dtype: torch.dtype, device: torch.device | str) -> str:
    """Why int4 weights of this group size are dequantized on the device for activations of `dtype`; "" where a kernel reads them packed."""
    if torch.device(device).type != "cuda":
        return f"on the {torch.device(device).type.upper()}"
    from kernels.w4a16.layout import GROUP_SIZES
    from kernels.w4a16.product import DTYPES

    if dtype not in DTYPES:
        return f"no kernel takes {str(dtype).removeprefix('torch.')}"
    return "" if group_size in GROUP_SIZES else f"no kernel takes group size {group_size}"


def runs_packed(weights: LinearWeights, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether a kernel reads this linear's int4 weight as it is, for activations of `dtype` on the device."""
    return isinstance(weights.weight, Quantized) and not why_unpacked(
        weights.weight.group_size, dtype, device
    )


def make_linear(weights: LinearWeights, dtype: torch.dtype, device: torch.device | str) -> Layer:
    """A layer for inference on the device."""
    if runs_packed(weights, dtype, device):
        return Int4Linear(weights, None, device)
    bias = None if weights.bias is None else weights.bias.to(device=device, dtype=dtype)
    return DenseLinear(dense_weight(weights.weight, dtype, device), bias)


def make_gated(
    gate: LinearWeights,
    up: LinearWeights,
    dtype: torch.dtype,
    device: torch.device | str,
    gated_mul: Callable[[Tensor], Tensor],
    name: Activation,
) -> Layer | None:
    """act(gate(x)) * up(x) as one layer, (M, K) -> (M, I); None where the two differ in format."""
    fused = fuse_linears((gate, up))
    if fused is None:
        return None
    if runs_packed(gate, dtype, device):
        return Int4Linear(gate, up, device) if name == "silu" else Int4Gated(fused, gated_mul, device)
    bias = None if fused.bias is None else fused.bias.to(device=device, dtype=dtype)
    return DenseGated(dense_weight(fused.weight, dtype, device), bias, gated_mul, name)


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
    """The bias (N,), zeros where there is none."""
    if part.bias is not None:
        return part.bias
    like = part.weight.scales if isinstance(part.weight, Quantized) else part.weight
    return like.new_zeros(part.weight.shape[0])


def pack_int4(weights: LinearWeights, device: torch.device | str) -> "W4Weight":
    """The int4 weight in the order of the kernels, on the device."""
    from kernels.w4a16.product import prepare

    assert isinstance(weights.weight, Quantized)
    bias = None if weights.bias is None else weights.bias.to(device)
    # int3 and int2 codes lie in the same nibbles: the kernels need not know
    return prepare(replace(weights.weight.to(device), bits=4), bias)
