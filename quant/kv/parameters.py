"""Static parameters of the int8 KV cache from the ranges of K and V after RoPE. The rounding itself is `kernels.kv.int8`.

Hkv key heads, D head size.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights
from convert.errors import InputError
from kernels.int4 import Quantized
from kernels.kv.int8 import kv_qparams

FP16_MAX = 65504.0
OUTLIER_FACTOR = 20.0  # a head whose range is this many times its layer's median is named

Ranges = Mapping[
    str, tuple[Tensor, Tensor]
]  # "k" and "v" -> minima and maxima (Hkv,) over tokens and channels


def kv_parameters(ranges: Sequence[Ranges]) -> tuple[dict[str, Tensor], list[str]]:
    """`layers.{i}.{k,v}.{scale,zero}` fp32 (Hkv,) from the ranges of each layer, and warnings.

    Clamp rule: the whole observed range is kept, outliers included, up to fp16's +-65504; values beyond it saturate. A
    range of zero width keeps its value exactly. Raises InputError for a head without a range.
    """
    table: dict[str, Tensor] = {}
    warnings: list[str] = []
    for layer, parts in enumerate(ranges):
        for name in ("k", "v"):
            low, high = (part.float() for part in parts[name])
            wrong = ~(torch.isfinite(low) & torch.isfinite(high)) | (low > high)
            if bool(wrong.any()):
                heads = ", ".join(str(h) for h in wrong.nonzero().flatten().tolist())
                raise InputError(
                    f"layer {layer}, {name.upper()}: head {heads} has no finite range (minimum above maximum, or not a "
                    f"number). Calibrate again with text that reaches it, or use --kv-bits 16."
                )
            if bool(((low < -FP16_MAX) | (high > FP16_MAX)).any()):
                warnings.append(
                    f"layer {layer}, {name.upper()}: values beyond fp16's {FP16_MAX:.0f} are clamped."
                )
                low, high = low.clamp(-FP16_MAX, FP16_MAX), high.clamp(-FP16_MAX, FP16_MAX)
            width = high - low
            median = float(width.median())
            for head in (width > OUTLIER_FACTOR * median).nonzero().flatten().tolist() if median > 0 else []:
                warnings.append(
                    f"layer {layer}, {name.upper()}, head {head}: a range of {float(width[head]):.3g} against {median:.3g} "
                    f"of its neighbours costs precision; --kv-mode dynamic does not suffer from it."
                )
            scale, zero = kv_qparams(low, high)
            table[f"layers.{layer}.{name}.scale"], table[f"layers.{layer}.{name}.zero"] = scale, zero
    return table, warnings


def folded_ranges(
    channels: Mapping[str, tuple[Tensor, Tensor]], source: BlockWeights, quantized: BlockWeights
) -> dict[str, tuple[Tensor, Tensor]]:
    """Ranges of the quantized block from those of the float one, for saved statistics.

    channels: "k" and "v" -> minima and maxima (Hkv, D) of `source`. A scale folded into the rows of v changes V channel by
    channel; it is read off as the least-squares ratio of each quantized row to its float row, norm weights included,
    because a scale may also have moved from the norm into the columns. K keeps its ranges: what can be moved out of it is
    moved before the search (`quant.kv.key_smoothing`), in `source` and in these ranges alike.
    """
    low, high = channels["v"]
    before, after = _rows_of_v(source), _rows_of_v(quantized)  # (Hkv * D, H) float64
    ratio = (before * after).sum(1) / (before * before).sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    scaled = torch.stack([low, high]).double() * ratio.view(low.shape)
    return {
        "k": (channels["k"][0].amin(-1), channels["k"][1].amax(-1)),
        "v": (scaled.amin(0).amin(-1).float(), scaled.amax(0).amax(-1).float()),
    }


def _rows_of_v(weights: BlockWeights) -> Tensor:
    """v with the norm before it: (Hkv * D, H) float64."""
    weight = weights.linears["v"].weight
    dense = weight.dequantize() if isinstance(weight, Quantized) else weight
    norm = weights.norms.get("attn_norm")
    return dense.double().cpu() if norm is None else dense.double().cpu() * norm.double().cpu()
