"""GPTQ as published, and with act-order and static groups; works on one stacked linear and the Gram matrix of its inputs.

N out features, K in features, g group size, G = K / g groups. Codes are centred here: r = q - z, w^ = r * s.
"""

import torch
from torch import Tensor

from kernels.int4 import qparams
from kernels.search.sweeps import gptq_sweep
from quant.stage_clock import stage
from quant.statistics.gram import inverse_factor, unexplained

DAMPING = 0.01


def per_weight(part: Tensor, group_size: int, order: Tensor) -> Tensor:
    """Scales or zeros of groups, (N, G), as one value for each weight, transposed and in the order of a sweep: (K, N)."""
    return part.t()[torch.div(order, group_size, rounding_mode="floor")].contiguous()


def act_order(gram: Tensor) -> Tensor:
    """Columns by decreasing diagonal of G; ties keep their order, so that a run repeats."""
    return torch.argsort(gram.diagonal(), descending=True, stable=True)


def compensated_costs(gram: Tensor, damping: float = DAMPING) -> Tensor | None:
    """What a rounding error of each column costs once the columns after it, in act-order, have made up for what they can: (K,).

    GPTQ ends at the sum over j of e_j^2 c_j, e_j the error of column j in its turn and c_j the power of x_j that the columns
    after it do not explain (Chen et al., The Geometry of LLM Quantization, 2025). None where no damping makes G definite.
    """
    order = act_order(gram)
    found = unexplained(gram[order][:, order], damping)
    if found is None:
        return None
    costs = torch.empty_like(found)
    costs[order] = found
    return costs


@stage("error compensation")
def gptq_static(
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_size: int,
    bits: int,
    damping: float = DAMPING,
) -> tuple[Tensor, float] | None:
    """Act-order GPTQ on given group parameters: weight (N, K), gram (K, K), scale and zero (N, G), all float32.

    Returns centred codes (N, K) and the damping that was needed, or None where no damping made G definite.
    """
    order = act_order(gram)
    found = inverse_factor(gram[order][:, order], damping)
    if found is None:
        return None
    factor, used = found
    codes = torch.empty_like(weight)
    codes[:, order] = gptq_sweep(
        weight.t()[order].contiguous(),
        factor,
        per_weight(scale, group_size, order),
        per_weight(zero, group_size, order),
        2**bits - 1,
    ).t()
    return codes, used


@stage("error compensation")
def gptq_published(
    weight: Tensor,
    gram: Tensor,
    group_size: int,
    bits: int,
    damping: float = DAMPING,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """GPTQ in the columns' own order; a group's scale comes from its weights as the errors before it left them.

    Returns centred codes (N, K), scale (N, G), zero (N, G) and the damping, or None where G stays indefinite.
    """
    found = inverse_factor(gram, damping)
    if found is None:
        return None
    factor, used = found
    work = weight.t().contiguous()  # (K, N)
    codes = torch.empty_like(work)
    scales, zeros = [], []
    for start in range(0, len(work), group_size):
        end = start + group_size
        part = work[start:end].clone()
        scale, zero = qparams(part.amin(0), part.amax(0), bits, symmetric)
        full_scale, full_zero = scale.expand_as(part).contiguous(), zero.expand_as(part).contiguous()
        codes[start:end] = gptq_sweep(
            part.clone(), factor[start:end, start:end].contiguous(), full_scale, full_zero, 2**bits - 1
        )
        if end < len(work):
            errors = _column_errors(part, codes[start:end] * scale, factor[start:end, start:end])
            work[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
        scales.append(scale)
        zeros.append(zero)
    return codes.t().contiguous(), torch.stack(scales, 1), torch.stack(zeros, 1), used


def _column_errors(weight: Tensor, rounded: Tensor, factor: Tensor) -> Tensor:
    """e with w_j - sum over i < j of factor[i, j] e_i - w^_j = e_j: a unit triangular system, (g, N)."""
    errors: Tensor = torch.linalg.solve_triangular(
        factor.t(), weight - rounded, upper=False, unitriangular=True
    )
    return errors
