"""The kernel that chooses ranges, in Triton's interpreter, against its torch reference."""

import pytest
import torch

from kernels.int4 import SCALE_MAX, SCALE_MIN
from kernels.search import clip
from kernels.search.clip import choose_ranges


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_kernel_chooses_what_the_reference_chooses(symmetric: bool) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(1)
    rows, groups, size, count = 70, 2, 32, 2  # rows that do not fill two tiles
    weight = torch.randn(rows, groups * size, generator=generator)
    weight[3] = 0  # a dead row
    scale = torch.rand(count, groups * size, generator=generator) + 0.5
    blocks = torch.randn(groups, size, 2 * size, generator=generator)
    blocks = blocks @ blocks.transpose(1, 2)
    pairs = torch.cartesian_prod(torch.linspace(1, 0.6, 3), torch.linspace(1, 0.6, 3))
    index = torch.full((count, rows, groups), -1, dtype=torch.int32)
    loss = torch.full((count, rows, groups), torch.nan)
    grid = (-(-rows // clip._ROWS), groups, count)
    clip._choose_ranges_kernel[grid](
        weight, scale, blocks, pairs, index, loss, rows, groups * size, groups, len(pairs), 15, SCALE_MIN, SCALE_MAX,
        GROUP=size, ROWS=clip._ROWS, SYMMETRIC=symmetric,
    )  # fmt: skip
    wanted_index, wanted_loss = choose_ranges(weight, scale, blocks, pairs, 4, symmetric)
    # a code at a tie may fall to the other side, which changes a loss by little and seldom the choice
    assert float((index != wanted_index).float().mean()) < 0.02
    torch.testing.assert_close(loss, wanted_loss, rtol=2e-2, atol=2e-2 * float(wanted_loss.mean()))
