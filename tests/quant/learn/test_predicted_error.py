"""Which part of the error of earlier blocks is predicted: a linear one on new text too, noise not at all."""

import pytest
import torch

from quant.learn.predicted_error import predicted_output

H = 24


def streams(
    samples: int, linear: float, noise: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """f, x and y = f + linear * (x at unit power) B + noise."""
    fixed, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    mix = torch.randn(H, H, generator=fixed) / H**0.5
    x = torch.randn(samples, 40, H, generator=generator)
    f = x + 0.3 * torch.randn(x.shape, generator=generator)
    unit = x * x.pow(2).mean(-1, keepdim=True).rsqrt()
    return f, x, f + linear * unit @ mix + noise * torch.randn(x.shape, generator=generator)


@pytest.mark.parametrize("part", [1, 3, 64])
def test_a_linear_error_is_predicted_and_noise_is_not(part: int) -> None:
    f, x, y = streams(20, 0.2, 0.05, seed=1)
    got = predicted_output(f, x, y, None, part)
    assert float((y - got).pow(2).mean()) < 1.3 * 0.05**2 < 0.1 * float((y - f).pow(2).mean())
    f, x, y = streams(20, 0.0, 0.2, seed=2)
    got = predicted_output(f, x, y, None, part)
    assert float((got - f).pow(2).mean()) < 0.05 * 0.2**2


def test_the_metric_says_which_errors_count() -> None:
    f, x, y = streams(6, 0.05, 0.0, seed=3)
    y[..., 0] += 2.0 * torch.randn(
        6, 40, generator=torch.Generator().manual_seed(4)
    )  # loud and not predictable
    blind = torch.eye(H)
    blind[0, 0] = 0.0
    left = [(y - predicted_output(f, x, y, metric, 8))[..., 1:].pow(2).mean() for metric in (None, blind)]
    assert left[1] < left[0]


def test_parts_do_not_change_it_and_too_little_text_changes_nothing() -> None:
    f, x, y = streams(7, 0.2, 0.05, seed=5)
    assert torch.allclose(predicted_output(f, x, y, None, 2), predicted_output(f, x, y, None, 7), atol=1e-5)
    assert predicted_output(f[:1], x[:1], y[:1], None, 8) is not None
    assert torch.equal(predicted_output(f[:1], x[:1], y[:1], None, 8), f[:1])


def test_a_few_heavy_tokens_do_not_decide() -> None:
    f, x, y = streams(20, 0.2, 0.05, seed=6)
    rest = (y - predicted_output(f, x, y, None, 8))[:, 1:].pow(2).mean()
    y[:, 0] = 1000.0
    heavy = (y - predicted_output(f, x, y, None, 8))[:, 1:].pow(2).mean()
    assert heavy < 2 * rest
