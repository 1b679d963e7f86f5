"""The Gram form of the loss against the loss itself, the Cholesky factor against the inverse, weights of tokens."""

import pytest
import torch

from convert.errors import InputError
from quant.statistics.gram import damped, diagonal_blocks, inverse_factor, loss_rows, observe, unexplained


def test_the_gram_form_equals_the_loss_computed_directly() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, 96, generator=generator, dtype=torch.float64) * torch.exp(
        torch.randn(96, generator=generator)
    )
    delta = torch.randn(40, 96, generator=generator, dtype=torch.float64)
    flat = x.flatten(0, 1)
    gram = flat.t() @ flat / len(flat)
    direct = (flat @ delta.t()).pow(2).sum(0) / len(flat)
    torch.testing.assert_close(loss_rows(delta, gram), direct, rtol=1e-5, atol=0)


def test_observed_statistics_equal_those_of_all_tokens_and_split_into_fit_and_hold() -> None:
    x = torch.randn(32, 64, 24, generator=torch.Generator().manual_seed(1))
    stats = observe(x.split(5), "x")
    flat = x.flatten(0, 1)
    torch.testing.assert_close(stats.gram, flat.t() @ flat / len(flat), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.mean_abs, flat.abs().mean(0), rtol=1e-4, atol=1e-6)
    assert stats.tokens == 2048 and stats.hold is stats.gram  # 256 held-out tokens are too few to judge by
    more = torch.randn(128, 80, 24, generator=torch.Generator().manual_seed(2))
    split = observe(more.split(16), "x")
    held = more[7::8].flatten(0, 1)
    torch.testing.assert_close(split.hold, held.t() @ held / len(held), rtol=1e-4, atol=1e-5)


def test_every_eighth_sample_is_held_out_whatever_the_chunks() -> None:
    x = torch.randn(128, 80, 24, generator=torch.Generator().manual_seed(3))
    held = x[7::8].flatten(0, 1)
    for chunk in (5, 7, 128):
        found = observe(x.split(chunk), "x")
        torch.testing.assert_close(found.hold, held.t() @ held / len(held), rtol=1e-4, atol=1e-5)


def test_damping_is_a_share_of_the_mean_of_the_diagonal() -> None:
    torch.testing.assert_close(
        damped(torch.diag(torch.tensor([1.0, 3.0])), 0.5).diagonal(), torch.tensor([2.0, 4.0])
    )
    assert float(damped(torch.zeros(2, 2), 0.5).diagonal().min()) > 0


def test_too_many_broken_tokens_stop() -> None:
    x = torch.ones(2, 8, 4)
    x[0, :4] = torch.nan
    with pytest.raises(InputError, match="down: 4 of 16 tokens"):
        observe([x], "down")


def test_the_factor_is_that_of_the_inverse_with_a_unit_diagonal() -> None:
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(5))
    gram = x.t() @ x / 500
    found = inverse_factor(gram, 0.01)
    assert found is not None and found[1] == 0.01
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(gram, 0.01).double()), upper=True)
    torch.testing.assert_close(found[0].double(), upper / upper.diagonal()[:, None], rtol=1e-3, atol=1e-4)


def test_a_gram_matrix_that_is_not_definite_climbs_the_ladder_or_gives_up() -> None:
    gram = torch.eye(32)
    gram[0, 1] = gram[1, 0] = 1.3  # not a Gram matrix: an eigenvalue of -0.3
    found = inverse_factor(gram, 0.01)
    assert found is not None and found[1] >= 0.3
    assert inverse_factor(torch.full((32, 32), torch.nan), 0.01) is None
    assert inverse_factor(torch.zeros(32, 32), 0.01) is not None


def test_diagonal_blocks_are_those_of_the_groups() -> None:
    gram = torch.arange(36.0).view(6, 6)
    blocks = diagonal_blocks(gram, 3)
    assert torch.equal(blocks[0], gram[:3, :3]) and torch.equal(blocks[1], gram[3:, 3:])


def test_a_diagonal_matrix_may_come_as_its_diagonal() -> None:
    generator = torch.Generator().manual_seed(6)
    delta, power = torch.randn(5, 6, generator=generator), torch.rand(6, generator=generator)
    whole = torch.diag(power)
    torch.testing.assert_close(loss_rows(delta, power), loss_rows(delta, whole))
    assert torch.equal(diagonal_blocks(power, 3), diagonal_blocks(whole, 3))


def test_what_later_columns_do_not_explain_is_the_residual_of_their_regression() -> None:
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x[:, 2] += 2 * x[:, 6]
    gram = x.t() @ x / 500
    found = unexplained(gram.float(), 1e-7)
    assert found is not None
    for column in range(7):
        fitted = x[:, column + 1 :] @ torch.linalg.lstsq(x[:, column + 1 :], x[:, column]).solution
        assert float(found[column]) == pytest.approx(float((x[:, column] - fitted).square().mean()), rel=1e-4)
    assert float(found[7]) == pytest.approx(float(gram[7, 7]), rel=1e-5)
    assert unexplained(torch.full((8, 8), torch.nan), 0.01) is None
