"""What follows compensated rounding: integer coordinate descent, and scales refitted in closed form. Both lower tr(dW G dW^T).

N out features, K in features, g group size, G = K / g groups. Codes are centred: r = q - z, w^ = r * s.
"""

import torch
from torch import Tensor

from kernels.int4 import round_scale
from kernels.products import linear, times_symmetric
from kernels.search.group_forms import group_forms
from kernels.search.sweeps import descent_sweep
from quant.search.rounding.compensation import act_order, per_weight
from quant.stage_clock import stage

_SOLVE_BYTES = 1 << 29  # memory for the normal equations of the rows solved at a time


def expand(codes: Tensor, scale: Tensor) -> Tensor:
    """w^ = r * s: codes (N, K), scale (N, G) -> (N, K)."""
    rows, groups = scale.shape
    return (codes.view(rows, groups, -1) * scale[..., None]).view(codes.shape)


@stage("descent")
def descend(
    weight: Tensor,
    gram: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_size: int,
    bits: int,
    sweeps: int,
) -> Tensor:
    """Integer coordinate descent, columns by decreasing G_jj. gram must have a positive diagonal. Returns new codes (N, K)."""
    order = act_order(gram)
    sorted_gram = gram[order][:, order].contiguous()
    new = codes.t()[order].contiguous()
    full_scale, full_zero = per_weight(scale, group_size, order), per_weight(zero, group_size, order)
    gradient = linear(sorted_gram, (new * full_scale - weight.t()[order]).t())
    for _ in range(sweeps):
        descent_sweep(new, gradient, sorted_gram, full_scale, full_zero, 2**bits - 1)
    out = torch.empty_like(codes)
    out[:, order] = new.t()
    return out


@stage("refit of scales")
def refit_scales(weight: Tensor, gram: Tensor, codes: Tensor, scale: Tensor, ridge: float = 1e-4) -> Tensor:
    """The scales of each row that minimise tr(dW G dW^T) for fixed codes, by normal equations, rounded to fp16: (N, G).

    With u_i the codes of group i: A_ij = u_i^T G_ij u_j, b_i = u_i^T (G w)_i, A s = b. A small ridge holds the solution
    at the scales that are there; one that leaves half to twice of its old value is not taken.
    """
    rows, groups = scale.shape
    size = weight.shape[1] // groups
    out = torch.empty_like(scale)
    step = max(1, _SOLVE_BYTES // (8 * groups * groups + 16 * weight.shape[1]))
    for start in range(0, rows, step):
        at = slice(start, start + step)
        u = codes[at].view(-1, groups, size)
        target = (u * times_symmetric(weight[at], gram).view(u.shape)).sum(-1).double()  # (n, G)
        normal = group_forms(codes[at], gram, size).double()  # (n, G, G)
        weight_of_old = ridge * normal.diagonal(dim1=1, dim2=2) + 1e-12
        normal += torch.diag_embed(weight_of_old)
        target += weight_of_old * scale[at].double()
        solved = _solve(normal, target).float()
        old = scale[at]
        usable = solved.isfinite() & (solved > 0.5 * old) & (solved < 2 * old)
        out[at] = round_scale(torch.where(usable, solved, old))
    return out


def _solve(normal: Tensor, target: Tensor) -> Tensor:
    """Solutions (n, G) of n positive definite systems (n, G, G); rows whose matrix is not come back as NaN or anything else."""
    if not normal.is_cuda:
        solved: Tensor = torch.linalg.solve_ex(normal, target[..., None])[0][..., 0]
        return solved
    lower, failed = torch.linalg.cholesky_ex(normal)
    found = torch.cholesky_solve(target[..., None], lower)[..., 0]
    return torch.where((failed == 0)[:, None], found, torch.full_like(found, torch.nan))
