"""The fused column sweeps and the clip kernel against their torch references, on random problems of real shapes."""

import pytest
import torch

from kernels.search.clip import choose_ranges
from kernels.search.group_forms import group_forms
from kernels.search.sweeps import descent_sweep, gptq_sweep
from quant.search.scales.clip import shrink_pairs
from quant.statistics.gram import inverse_factor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(576, 960), (1536, 576), (576, 100), (96, 33)]  # (K, N), N also no multiple of a tile


def problem(cols: int, rows: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(cols + rows)
    x = torch.randn(cols, 2 * cols, generator=generator)
    weight = torch.randn(cols, rows, generator=generator)
    scale = torch.rand(cols, rows, generator=generator) * 0.2 + 0.05
    zero = torch.randint(0, 16, (cols, rows), generator=generator).float()
    return x @ x.t() / cols, weight, scale, zero


@pytest.mark.parametrize(("cols", "rows"), SHAPES)
def test_column_sweeps_round_as_the_reference_does(cols: int, rows: int) -> None:
    gram, weight, scale, zero = problem(cols, rows)
    found = inverse_factor(gram, 0.01)
    assert found is not None
    codes = gptq_sweep(weight.clone(), found[0], scale, zero, 15)
    on_gpu = gptq_sweep(weight.cuda(), found[0].cuda(), scale.cuda(), zero.cuda(), 15).cpu()
    # sums in another order may flip a rounding, and an early flip moves what follows
    assert float((codes != on_gpu).float().mean()) < 0.01
    gradient = gram @ (codes * scale - weight)
    moved, moved_gpu = codes.clone(), codes.cuda()
    gradient_gpu = gradient.cuda()
    descent_sweep(moved, gradient, gram, scale, zero, 15)
    descent_sweep(moved_gpu, gradient_gpu, gram.cuda(), scale.cuda(), zero.cuda(), 15)
    assert float((moved != moved_gpu.cpu()).float().mean()) < 0.01


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("group_size", (32, 64, 128))
def test_ranges_are_those_of_the_reference(group_size: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(group_size)
    weight = torch.randn(100, 512, generator=generator)
    blocks = torch.randn(512 // group_size, group_size, 2 * group_size, generator=generator)
    blocks = blocks @ blocks.transpose(1, 2)
    column_scales = torch.rand(3, 512, generator=generator) + 0.5
    pairs = shrink_pairs(5, 0.55, torch.device("cpu"))
    index, loss = choose_ranges(weight, column_scales, blocks, pairs, 4, symmetric)
    on_gpu = choose_ranges(weight.cuda(), column_scales.cuda(), blocks.cuda(), pairs.cuda(), 4, symmetric)
    # TF32 has a 10-bit significand: two pairs closer than that may change places
    assert float((index != on_gpu[0].cpu()).float().mean()) < 0.01
    torch.testing.assert_close(on_gpu[1].cpu(), loss, rtol=1e-2, atol=1e-2 * float(loss.mean()))


@pytest.mark.parametrize(("rows", "cols", "size"), [(100, 576, 64), (333, 1408, 128), (64, 96, 32)])
def test_forms_of_groups_are_those_of_the_reference(rows: int, cols: int, size: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(-8, 8, (rows, cols), generator=generator).float()
    x = torch.randn(2 * cols, cols, generator=generator)
    gram = x.t() @ x / len(x)
    wanted = group_forms(codes, gram, size).double()
    found = group_forms(codes.cuda(), gram.cuda(), size).cpu().double()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_sweeps_over_many_blocks_round_as_the_reference_does() -> None:
    """More columns than are updated together: what follows a span is updated by one product."""
    gram, weight, scale, zero = problem(1408, 64)
    found = inverse_factor(gram, 0.01)
    assert found is not None
    codes = gptq_sweep(weight.clone(), found[0], scale, zero, 15)
    on_gpu = gptq_sweep(weight.cuda(), found[0].cuda(), scale.cuda(), zero.cuda(), 15).cpu()
    assert float((codes != on_gpu).float().mean()) < 0.02
