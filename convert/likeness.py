"""Are these the weights of that source? Linears up to one factor for each row and column, the rest as it stands.

N out features, K in features. AWQ moves factors between neighbouring operations: behind the best factors rounding leaves a
small rest, codes in a wrong order or of other weights leave nearly everything.
"""

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint
from kernels.int4 import Quantized

SAMPLE_ROWS = 256  # of each linear that are compared with the source
REST_LIMIT = (
    0.8  # relative; int4 rounding leaves about 0.1, int2 about 0.5, another order of the same codes about 1
)
SAME_LIMIT = 1e-2  # relative, for linears in the source's own form: codes are equal, floats at most rounded to bfloat16


def compare_block(
    block: BlockWeights, source: BlockWeights, ckpt: Checkpoint, origin: Checkpoint, unlike: list[str]
) -> dict[str, float]:
    """ "block.role" -> rest; names of weights that are not the source's are added to `unlike`.

    A packed format holds what its source held, moved about: where both are int4, or both float and one a workspace, nothing
    is refitted, and norms and biases count too.
    """
    is_same_form = (ckpt.config.quantization is None) == (origin.config.quantization is None)
    is_moved = is_same_form and (ckpt.kind.startswith("workspace") or ckpt.config.quantization is not None)
    rests = {}
    for role, linear in block.linears.items():
        name = f"{block.index}.{role}"
        found, wanted = _sampled(linear.weight), _sampled(source.linears[role].weight)
        rests[name] = _plain_rest(found, wanted) if is_moved else relative_rest(found, wanted)
        if not rests[name] <= (SAME_LIMIT if is_moved else REST_LIMIT):
            unlike.append(name)
        bias = source.linears[role].bias
        if (
            is_moved
            and bias is not None
            and (linear.bias is None or _plain_rest(linear.bias, bias) > SAME_LIMIT)
        ):
            unlike.append(name + " bias")
    if is_moved:
        norms = [
            role for role, norm in block.norms.items() if _plain_rest(norm, source.norms[role]) > SAME_LIMIT
        ]
        unlike += [f"{block.index}.{role}" for role in norms]
    return rests


def _plain_rest(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))


def _sampled(weight: Tensor | Quantized) -> Tensor:
    """Evenly spaced rows, (at most SAMPLE_ROWS, K) float32."""
    rows = torch.linspace(0, weight.shape[0] - 1, min(SAMPLE_ROWS, weight.shape[0])).long()
    if isinstance(weight, Quantized):
        part = Quantized(
            weight.codes[rows], weight.scales[rows], weight.zeros[rows], weight.group_size, weight.bits
        )
        return part.dequantize()
    return weight[rows].float()


def relative_rest(found: Tensor, source: Tensor) -> float:
    """min over row factors r and column factors c of ||found - r source c|| / ||found||, by alternating least squares."""
    norm = found.norm()
    if float(norm) == 0.0:
        return 0.0 if float(source.norm()) == 0.0 else 1.0
    rows, cols = torch.ones(found.shape[0], 1), torch.ones(1, found.shape[1])
    for _ in range(4):
        base = source * rows
        cols = (found * base).sum(0, keepdim=True) / base.square().sum(0, keepdim=True).clamp(min=1e-30)
        base = source * cols
        rows = (found * base).sum(1, keepdim=True) / base.square().sum(1, keepdim=True).clamp(min=1e-30)
    return float((found - source * rows * cols).norm() / norm)


def distance(found: Tensor, source: Tensor) -> float:
    """Largest difference relative to the largest source value, by slices of rows."""
    if found.shape != source.shape:
        return float("inf")
    peak = max(float(source.abs().max()), 1e-30)
    pairs = zip(found.split(4096), source.split(4096), strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs) / peak
