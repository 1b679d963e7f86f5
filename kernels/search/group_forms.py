"""Quadratic forms of groups: for each row, how the codes of every two quantization groups meet in the Gram matrix.

Legend: N out features, K in features, g group size, G = K / g groups. Knows nothing of scales or models.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installs: the torch reference below does the work
    triton = None

_ROWS = 64  # rows of one program


def stages(group_size: int) -> int:
    """Blocks of the Gram matrix that a program of the kernel has under way: of large ones shared memory holds one."""
    return 1 if group_size >= 128 else 2


def group_forms(codes: Tensor, gram: Tensor, group_size: int) -> Tensor:
    """A_nij = u_ni^T G_ij u_nj with u_ni the codes of row n in group i, G_ij the block of gram of groups i and j.

    Args:
        codes: (N, K) float32, integers. gram: (K, K) float32, symmetric.
    Returns (N, G, G) float32, symmetric. The GPU multiplies in TF32, in which the codes are exact, and adds in float32.
    Raises ValueError on shapes that do not fit, and on groups that are not 16, 32, 64 or 128 on the GPU.
    """
    rows, cols = codes.shape
    if tuple(gram.shape) != (cols, cols) or cols % group_size:
        raise ValueError(
            f"The codes have {cols} columns in groups of {group_size}, the Gram matrix is {tuple(gram.shape)}: expected whole groups "
            f"and {(cols, cols)}."
        )
    groups = cols // group_size
    if not codes.is_cuda:
        return _group_forms_torch(codes, gram, group_size)
    if group_size not in (16, 32, 64, 128):
        raise ValueError(f"Groups of {group_size}: the GPU kernel reads 16, 32, 64 or 128.")
    out = torch.empty(rows, groups, groups, dtype=torch.float32, device=codes.device)
    _group_forms_kernel[(triton.cdiv(rows, _ROWS), groups)](
        codes.contiguous(), gram.contiguous(), out, rows, cols, groups, GROUP=group_size, ROWS=_ROWS,
        num_warps=8 if group_size >= 128 else 4, num_stages=stages(group_size),
    )  # fmt: skip
    return out


def _group_forms_torch(codes: Tensor, gram: Tensor, group_size: int) -> Tensor:
    u = codes.view(len(codes), -1, group_size)
    out = torch.empty(len(u), u.shape[1], u.shape[1], dtype=codes.dtype, device=codes.device)
    for i in range(u.shape[1]):
        product = torch.matmul(u[:, i], gram[i * group_size : (i + 1) * group_size]).view(u.shape)
        out[:, i] = (u * product).sum(-1)
    return out


if triton is not None:

    @triton.jit
    def _group_forms_kernel(  # type: ignore[no-untyped-def]
        code_ptr, gram_ptr, out_ptr,
        rows, cols, groups,
        GROUP: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """One program: ROWS rows, one group i, all groups j from i on; formula in `group_forms`.

        code (N, K), gram (K, K), out (N, G, G), float32 row-major; rows beyond N are masked. Both halves of out are written.
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        first = tl.program_id(1)
        lane = tl.arange(0, GROUP)
        mask = row < rows
        at = row[:, None].to(tl.int64) * cols + lane[None, :]
        left = tl.load(code_ptr + at + first * GROUP, mask=mask[:, None], other=0.0)
        block = (first * GROUP + lane[:, None]).to(tl.int64) * cols + lane[None, :]
        place = row.to(tl.int64) * groups
        for second in range(first, groups):
            gram = tl.load(gram_ptr + block + second * GROUP)
            right = tl.load(code_ptr + at + second * GROUP, mask=mask[:, None], other=0.0)
            form = tl.sum(tl.dot(left, gram, input_precision="tf32") * right, axis=1)
            tl.store(out_ptr + (place + first) * groups + second, form, mask=mask)
            tl.store(out_ptr + (place + second) * groups + first, form, mask=mask)
