"""Per-channel scales of a linear's input, folded into whatever produced that input; exact where the format allows it.

N out features, K in features, Hq and Hkv heads of size D. A scale e multiplies the columns of a weight; its inverse goes
into the previous operation: a norm's weight, the rows of v (one scale per KV channel, shared by its query heads) or of up.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from convert.checkpoint import LinearWeights
from convert.config import ModelConfig
from convert.families.norms import storable_norm
from kernels.int4 import SCALE_MIN, Quantized
from quant.block_states import FloatLinear

SCALE_RANGE = 64.0  # channel scales stay within 1/64 .. 64
NEAR = 1 / 16  # how far a scale may move to one that a norm with an offset can take over
_NORMAL_MIN = 2.0**-14  # smallest normal fp16: below it a folded value would lose bits


@dataclass(frozen=True)
class Fold:
    """How the columns of one linear map to the channels of the operation before it.

    shrink: a statistic of the K columns -> of the channels; spread: scales of the channels -> of the K columns;
    snap: moves scales to the nearest ones that the previous operation can take over.
    """

    shrink: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]
    snap: Callable[[Tensor], Tensor]


def norm_fold(norm: Tensor, offset: float = 0.0) -> Fold:
    """Into the weight (K,) of the norm before: files hold norm / e exactly (`storable_norm`)."""
    return Fold(_same, _same, lambda scale: snap_to_norm(scale, norm, offset))


def row_fold(weight: Tensor) -> Fold:
    """Into the rows of the linear before, whose weight is (K, K')."""
    limit = weight.abs().amax(1)
    return Fold(_same, _same, lambda scale: _snap_to_rows(scale, limit))


def kv_fold(weight: Tensor, config: ModelConfig) -> Fold:
    """From the columns of o, (Hq * D), into the rows of v, (Hkv * D, H): query heads share the scale of their KV head."""
    kv, group, size = config.num_kv_heads, config.query_group, config.head_dim
    limit = weight.abs().amax(1)
    return Fold(
        lambda value: value.view(*value.shape[:-1], kv, group, size).mean(-2).flatten(-2),
        lambda scale: (
            scale.view(*scale.shape[:-1], kv, 1, size).expand(*scale.shape[:-1], kv, group, size).flatten(-3)
        ),
        lambda scale: _snap_to_rows(scale, limit),
    )


def no_fold() -> Fold:
    """Nothing before takes a scale over."""
    return Fold(_same, _same, torch.ones_like)


def _same(value: Tensor) -> Tensor:
    return value


def snap_to_norm(scale: Tensor, norm: Tensor, offset: float = 0.0) -> Tensor:
    """The scales next to `scale` (..., K) for which files hold norm (K,) / scale exactly; 1 where the norm gives no choice.

    Where they hold it minus an offset, its steps near 0 are coarse: a scale that would move by more than NEAR keeps 1.
    """
    norm = norm.float()
    folded = storable_norm(norm / scale, offset).float()
    usable = (folded.abs() >= _NORMAL_MIN) & folded.isfinite()
    snapped = norm / torch.where(usable, folded, torch.ones_like(folded))
    usable &= ((snapped / scale - 1).abs() <= NEAR) | (offset == 0)
    return torch.where(usable, snapped, torch.ones_like(scale))


def _snap_to_rows(scale: Tensor, row_max: Tensor) -> Tensor:
    """Rows take over any scale that keeps them inside fp16's normal range; dead rows keep 1."""
    folded = row_max / scale
    usable = (folded > 256 * _NORMAL_MIN) & (folded < 32768)
    return torch.where(usable, scale, torch.ones_like(scale))


def fold_norm(norm: Tensor, scale: Tensor, offset: float = 0.0) -> Tensor:
    """norm / scale as files can hold it, (K,)."""
    return storable_norm(norm.float() / scale, offset)


@overload
def fold_rows(weights: FloatLinear, scale: Tensor) -> FloatLinear: ...


@overload
def fold_rows(weights: LinearWeights, scale: Tensor) -> LinearWeights: ...


def fold_rows(weights: LinearWeights, scale: Tensor) -> LinearWeights:
    """Rows divided by scale (N,): of a quantized weight only its fp16 scales move, its integers stay. The bias follows."""
    bias = weights.bias
    if bias is not None:
        bias = (bias.float() / scale.to(bias.device)).to(bias.dtype)
    if isinstance(weights.weight, Quantized):
        old = weights.weight.scales.float()
        scales = torch.where(
            old <= SCALE_MIN, old, old / scale[:, None]
        )  # an all-zero group keeps the smallest scale
        quantized = replace(weights.weight, scales=scales.clamp(SCALE_MIN, 65504).half())
        return LinearWeights(quantized, bias)
    dtype = weights.weight.dtype
    return FloatLinear((weights.weight.float() / scale[:, None]).to(dtype), bias)
