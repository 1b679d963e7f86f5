"""Static KV parameters: the formula by hand, the clamp rule, and ranges of a block whose v was scaled by a fold."""

import pytest
import torch

from convert.checkpoint import BlockWeights, LinearWeights
from convert.errors import InputError
from kernels.int4 import quantize
from quant.kv.parameters import folded_ranges, kv_parameters


def ranges(low, high):
    return {
        "k": (torch.tensor(low), torch.tensor(high)),
        "v": (torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])),
    }


def test_the_ends_of_the_range_are_the_ends_of_the_codes():
    table, warnings = kv_parameters([ranges([-2.0, 0.5], [3.0, 1.5])])
    scale, zero = table["layers.0.k.scale"], table["layers.0.k.zero"]
    assert torch.allclose((0 - 128) * scale + zero, torch.tensor([-2.0, 0.5]))  # code 0
    assert torch.allclose((255 - 128) * scale + zero, torch.tensor([3.0, 1.5]))  # code 255
    assert warnings == [] and scale.dtype == torch.float32


def test_a_range_of_no_width_keeps_its_value():
    table, _ = kv_parameters([ranges([0.25, 0.0], [0.25, 0.0])])
    scale, zero = table["layers.0.k.scale"], table["layers.0.k.zero"]
    assert (scale > 0).all()
    code = ((torch.tensor([0.25, 0.0]) - zero) / scale).round() + 128
    assert torch.allclose((code - 128) * scale + zero, torch.tensor([0.25, 0.0]), atol=1e-6)


def test_inverted_and_infinite_ranges_name_layer_and_head():
    with pytest.raises(InputError, match="layer 1, K: head 1 has no finite range"):
        kv_parameters([ranges([0.0, 0.0], [1.0, 1.0]), ranges([0.0, 2.0], [1.0, 1.0])])
    with pytest.raises(InputError, match="layer 0, K: head 0 has no finite range"):
        kv_parameters([ranges([-torch.inf, 0.0], [1.0, 1.0])])


def test_an_outlier_head_is_named_and_values_beyond_fp16_are_clamped():
    low, high = torch.tensor([-1.0, -1, -1, -100]), torch.tensor([1.0, 1, 1, 100])
    _, warnings = kv_parameters([{"k": (low, high), "v": (low / 100, high / 100)}])
    assert len(warnings) == 2 and "layer 0, K, head 3" in warnings[0] and "--kv-mode dynamic" in warnings[0]
    table, warnings = kv_parameters([ranges([-1e6, 0.0], [1e6, 1.0])])
    assert any("clamped" in warning for warning in warnings)
    assert float(127 * table["layers.0.k.scale"][0] + table["layers.0.k.zero"][0]) == pytest.approx(
        65504, rel=1e-3
    )


def test_ranges_follow_a_scale_that_was_folded_into_v_and_the_norm():
    generator = torch.Generator().manual_seed(0)
    heads, size, hidden = 2, 4, 64
    v = torch.randn(heads * size, hidden, generator=generator)
    norm = torch.rand(hidden, generator=generator) + 0.5
    fold = torch.rand(heads * size, generator=generator) + 0.5  # rows of v divided by it
    columns = torch.rand(hidden, generator=generator) + 0.5  # norm divided by it, columns of v multiplied
    quantized = quantize(v / fold[:, None] * columns, 4, 32)
    source = BlockWeights(0, {"v": LinearWeights(v)}, {"attn_norm": norm})
    after = BlockWeights(0, {"v": LinearWeights(quantized)}, {"attn_norm": norm / columns})
    low, high = -torch.rand(heads, size, generator=generator), torch.rand(heads, size, generator=generator)
    found = folded_ranges({"k": (low, high), "v": (low, high)}, source, after)
    wanted = (low / fold.view(heads, size)).amin(-1), (high / fold.view(heads, size)).amax(-1)
    # int4 rounding of random rows moves a row's length by some percent
    assert torch.allclose(found["v"][0], wanted[0], rtol=0.05) and torch.allclose(
        found["v"][1], wanted[1], rtol=0.05
    )
    assert torch.equal(found["k"][0], low.amin(-1))
