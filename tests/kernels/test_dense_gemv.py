"""One token through a float weight: the kernel in the Triton interpreter against float32, and the wrapper's checks."""

import pytest
import torch
import triton
from torch import Tensor

from kernels.dense_gemv import dense_gemv, dense_gemv_reference, launch_dense_gemv

needs_interpreter = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels were imported for a GPU: tests/gpu runs them there"
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


@needs_interpreter
@pytest.mark.parametrize(("rows", "cols"), [(8, 512), (18, 520), (34, 64), (6, 1300)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_kernel_equals_the_reference(rows: int, cols: int, gated: bool, has_bias: bool) -> None:
    """Whole and ragged tiles in both directions. Same roundings, sums in another order: within one step of fp16."""
    x, weight = normal(1, cols), (normal(rows, cols, seed=1) / cols**0.5).half()
    bias = normal(rows, seed=2) if has_bias else None
    got = launch_dense_gemv(x, weight, bias, gated, torch.float16, pdl=False)
    expected = dense_gemv_reference(x, weight, bias, gated=gated)
    assert got.shape == (1, rows // 2 if gated else rows)
    assert torch.allclose(got, expected, rtol=2e-3, atol=2e-3)
    wide = launch_dense_gemv(x, weight, bias, gated, torch.float32, pdl=False)
    assert wide.dtype == torch.float32 and torch.allclose(wide, expected.float(), rtol=2e-3, atol=2e-3)


def test_reference_is_the_plain_formula() -> None:
    x, weight, bias = normal(1, 24), normal(6, 24, seed=1), normal(6, seed=2)
    y = [
        sum(float(w) * float(v) for w, v in zip(row, x[0], strict=True)) + float(b)
        for row, b in zip(weight, bias, strict=True)
    ]
    assert torch.allclose(dense_gemv(x, weight, bias), torch.tensor([y]).half(), rtol=2e-3)
    gated = [g / (1 + 2.718281828**-g) * u for g, u in zip(y[:3], y[3:], strict=True)]
    assert torch.allclose(dense_gemv(x, weight, bias, gated=True), torch.tensor([gated]).half(), rtol=4e-3)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"expected \(1, K\)"):
        dense_gemv(normal(2, 8), normal(4, 8))
    with pytest.raises(ValueError, match="as many of each"):
        dense_gemv(normal(1, 8), normal(5, 8), gated=True)
    with pytest.raises(ValueError, match="bias"):
        dense_gemv(normal(1, 8), normal(4, 8), normal(4).float())
