"""The fused work of learned rounding in Triton's interpreter against its torch reference; its build for sm_90."""

import pytest
import torch

from kernels.search import training
from kernels.search.training import adam_step, round_to_grid, round_to_grid_backward

BUILD = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.search import training

def build(kernel, floats, **constants):
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in constants else "*fp32" if n.endswith("_ptr") else "fp32" if n in floats else "i32" for n in names}
    source = ASTSource(kernel, kinds, {(names.index(n),): v for n, v in constants.items()}, {})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"], kernel

for size in (32, 64, 128):
    build(training._round_kernel, (), GROUP=size, ROWS=training._ROWS)
    build(training._round_backward_kernel, (), GROUP=size, ROWS=training._ROWS)
for mean in (False, True):
    build(training._adam_kernel, ("rate", "fresh", "decay", "fresh_mean"), EPSILON=1e-20, HAS_MEAN=mean, BLOCK=training._BLOCK)
print("compiled")
"""


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels do the work, in the interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr(training, "_is_fused", lambda tensor: True)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(("groups", "size"), [(37, 32), (16, 128)])
def test_the_quantizer_and_its_gradient(groups: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    latent, grad = 6 * drawn(groups, size, seed=1), drawn(groups, size, seed=2)
    latent[0, :4] = torch.tensor([0.5, 1.5, -0.5, 30.0])  # halves go to even; beyond the grid
    scale = drawn(groups, 1, seed=3).abs() + 0.1
    zero = torch.randint(0, 16, (groups, 1), generator=torch.Generator().manual_seed(4)).float()
    found = round_to_grid(latent, scale, zero, 15), *round_to_grid_backward(grad, latent, scale, zero, 15)
    monkeypatch.setattr(training, "_is_fused", lambda tensor: False)
    wanted = round_to_grid(latent, scale, zero, 15), *round_to_grid_backward(grad, latent, scale, zero, 15)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-5, atol=1e-4)  # another order of the sum


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("with_mean", [False, True])
def test_adam(with_mean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[torch.Tensor]:
        state = [drawn(41, 50, seed=seed) for seed in (1, 2, 3)]
        state.append(state[-1].abs())  # a second moment is not negative
        param, grad, first, second = state
        mean = param.clone() if with_mean else None
        bias, schedule = torch.tensor([0.3, 0.2]), torch.tensor([0.5])
        adam_step(param, grad, first, second, bias, schedule, 0.01, (0.9, 0.95), mean, 0.95)
        return [param, first, second, *([] if mean is None else [mean])]

    found = run()
    monkeypatch.setattr(training, "_is_fused", lambda tensor: False)
    for ours, theirs in zip(found, run(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_kernels_compile_for_hopper(build_for_hopper) -> None:
    pytest.importorskip("triton")
    build_for_hopper(BUILD)
