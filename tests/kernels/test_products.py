"""Products on the CPU against float64: the fast path, and every case that must be left to torch."""

from collections.abc import Iterator

import pytest
import torch

from kernels.products import at_most_threads, linear, prepacked, threads_worth, times_symmetric


@pytest.fixture
def threads() -> Iterator[None]:
    """torch's number of threads, put back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 64])
def test_packed_products_have_the_same_bits_on_any_number_of_threads(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = prepacked(torch.randn(768, 1536, generator=generator))
    x = torch.randn(rows, 1536, generator=generator)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(linear(x, weight))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_threads_are_as_many_as_the_work_is_worth() -> None:
    assert threads_worth(1, 1 << 20) == 1  # 4 MiB take one core as long as waking another
    assert threads_worth(1, 1 << 26) > 8
    assert threads_worth(1024, 1 << 20) > 8


@pytest.mark.usefixtures("threads")
def test_threads_are_given_back() -> None:
    torch.set_num_threads(3)
    with pytest.raises(KeyError), at_most_threads(2):
        assert torch.get_num_threads() == 2
        raise KeyError
    assert torch.get_num_threads() == 3
    with at_most_threads(8):
        assert torch.get_num_threads() == 3
