"""The formulas of group quantization, by hand."""

import pytest
import torch

from kernels.int4 import SCALE_MIN, qparams, quantize


@pytest.mark.parametrize(
    ("values", "scale", "zero", "codes"),
    [
        ([0.0, 7.5, 15.0], 1.0, 0, [0, 8, 15]),  # half to even
        ([-15.0, -7.5, 0.0], 1.0, 15, [0, 7, 15]),
        ([3.0, 14.0, 15.0], 1.0, 0, [3, 14, 15]),  # all above 0: the range still begins at 0
        ([-15.0, -14.0, -3.0], 1.0, 15, [0, 1, 12]),  # all below 0: it still ends there
        ([0.0, 0.0, 0.0], SCALE_MIN, 0, [0, 0, 0]),
    ],
)
def test_codes_by_hand(values: list[float], scale: float, zero: int, codes: list[int]) -> None:
    found = quantize(torch.tensor([values]).repeat_interleave(8, dim=1), 4, 24)
    assert (float(found.scales), int(found.zeros)) == (scale, zero)
    assert found.codes[0, ::8].tolist() == codes


def test_the_range_always_holds_zero() -> None:
    """A padded or dead channel must come back as exactly 0 beside weights of one sign."""
    for sign in (1.0, -1.0):
        weight = sign * torch.linspace(5.0, 6.0, 32)[None]
        scale, zero = qparams(weight.amin(-1), weight.amax(-1), 4)
        assert float(scale) == pytest.approx(6.0 / 15, rel=1e-3) and float(zero) in (0.0, 15.0)
        error = (quantize(weight, 4, 32).dequantize() - weight).abs().max()
        assert float(error) <= 0.5 * float(scale) + 1e-3
