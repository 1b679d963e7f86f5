"""Products on the CPU against float64: the fast path, and every case that must be left to torch."""

import pytest
import torch

from kernels.products import linear, prepacked, times_symmetric


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# a single row, few rows, ragged sizes, three axes, views that are not contiguous
@pytest.mark.parametrize(
    "x",
    [
        normal(1, 48),
        normal(5, 48),
        normal(3, 7, 48),
        normal(48, 33).t(),
        normal(9, 96)[:, ::2],
        normal(0, 48),
    ],
)
@pytest.mark.parametrize("rows", [0, 1, 37, 64])
def test_equals_the_product_in_float64(x: torch.Tensor, rows: int) -> None:
    weight, bias = normal(48, rows).t(), normal(rows)
    expected = x.double() @ weight.double().t() + bias.double()
    # 48 products of normal numbers, each sum rounded in float32
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_packed_weight_gives_the_same_product() -> None:
    x, weight = normal(6, 64), normal(80, 64)
    torch.testing.assert_close(linear(x, prepacked(weight)), x @ weight.t(), rtol=1e-5, atol=1e-5)


def test_gradients_and_other_dtypes_are_left_to_torch() -> None:
    x, weight = normal(8, 32), normal(16, 32).requires_grad_()
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(16, 32))
    double = normal(8, 32).double()
    assert torch.equal(linear(double, double), torch.nn.functional.linear(double, double))


def test_symmetric_squares_of_groups() -> None:
    x, root = normal(3, 10, 32), normal(3, 32, 32)
    square = root @ root.transpose(1, 2)
    expected = x.double() @ square.double()
    torch.testing.assert_close(times_symmetric(x, square).double(), expected, rtol=1e-4, atol=1e-4)
    one = times_symmetric(x[0], square[0])
    torch.testing.assert_close(one.double(), expected[0], rtol=1e-4, atol=1e-4)


def test_the_same_operands_give_the_same_bits() -> None:
    x, weight = normal(100, 96), normal(70, 96)
    assert torch.equal(linear(x, weight), linear(x.clone(), weight.clone()))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError):
        linear(normal(8, 32), normal(16, 31))
