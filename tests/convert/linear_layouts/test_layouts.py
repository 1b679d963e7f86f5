"""Each layout of packed linears against words written out by hand, and what its reader refuses.

The example: N = 8 outputs, K = 32 inputs, one group of 32. The code of output n, input k is (n + k) mod 16, its zero point is n
(or 8), its scale 2^-n.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from convert.checkpoint import LinearWeights, Stored
from convert.config import Method, QuantFormat
from convert.errors import InputError
from convert.linear_layouts.mlx import rounded_offsets, whole_zeros
from convert.linear_layouts.table import LAYOUTS, parse_quantization
from kernels.int4 import Quantized

N, K, G = 8, 32, 32
CODES = torch.tensor([[(n + k) % 16 for k in range(K)] for n in range(N)], dtype=torch.uint8)
SCALES = torch.tensor([[2.0**-n] for n in range(N)]).half()
ZEROS = torch.arange(N, dtype=torch.uint8)[:, None]
EIGHTS = torch.full((N, 1), 8, dtype=torch.uint8)


def stored(zeros: Tensor) -> Stored:
    return LinearWeights(Quantized(CODES, SCALES, zeros, G)).stored()


def hexed(words: Tensor) -> list[list[str]]:
    """Words as hexadecimal text, most significant nibble first."""
    return [[f"{int(word) & 0xFFFFFFFF:08X}" for word in row] for row in words.view(torch.int32).tolist()]


# inputs 0-7, 8-15, 16-23, 24-31 of outputs 0 and 1: the code of input 8w + i is nibble i, the last one stands first in the text
FIRST_ROW, SECOND_ROW = ["76543210", "FEDCBA98"] * 2, ["87654321", "0FEDCBA9"] * 2


def test_awq_words() -> None:
    parts = LAYOUTS["awq"].write(stored(ZEROS), QuantFormat(4, G))
    # input 0 holds the codes 0..7 of the outputs, in the order 0 2 4 6 1 3 5 7 of nibbles
    assert hexed(parts["qweight"])[:2] == [["75316420"], ["86427531"]] and parts["qweight"].shape == (K, 1)
    assert hexed(parts["qzeros"]) == [["75316420"]]
    assert parts["scales"].tolist() == [[2.0**-n for n in range(N)]]


def test_compressed_tensors_words() -> None:
    fmt = QuantFormat(4, G, (), "compressed-tensors")
    parts = LAYOUTS["compressed-tensors"].write(stored(ZEROS), fmt)
    assert hexed(parts["weight_packed"])[:2] == [FIRST_ROW, SECOND_ROW]
    assert hexed(parts["weight_zero_point"]) == [["76543210"]]  # (N / 8, G): eight outputs in a word
    assert parts["weight_scale"].tolist() == [[2.0**-n] for n in range(N)]
    assert parts["weight_shape"].tolist() == [N, K] and parts["weight_shape"].dtype == torch.int64
    symmetric = QuantFormat(4, G, (), "compressed-tensors", True)
    assert "weight_zero_point" not in LAYOUTS["compressed-tensors"].write(stored(EIGHTS), symmetric)


def test_gptq_words() -> None:
    layout = LAYOUTS["gptq"]
    parts = layout.write(stored(ZEROS), QuantFormat(4, G, (), "gptq"))
    columns = parts["qweight"].t()
    assert parts["qweight"].shape == (K // 8, N) and hexed(columns)[:2] == [FIRST_ROW, SECOND_ROW]
    assert hexed(parts["qzeros"]) == [["76543210"]]  # v2: as they are
    assert parts["g_idx"].tolist() == [0] * K and parts["g_idx"].dtype == torch.int32
    first = layout.write(stored(EIGHTS), QuantFormat(4, G, (), "gptq", True, 1))
    assert hexed(first["qzeros"]) == [["77777777"]]  # v1: one less


def test_mlx_words() -> None:
    parts = LAYOUTS["mlx"].write(stored(ZEROS), QuantFormat(4, G, (), "mlx"))
    assert parts["weight"].dtype == torch.uint32 and hexed(parts["weight"])[:2] == [FIRST_ROW, SECOND_ROW]
    assert parts["scales"].tolist() == [[2.0**-n] for n in range(N)]
    assert parts["biases"].tolist() == [[-n * 2.0**-n] for n in range(N)]


def test_mlx_computes_our_weights() -> None:
    mlx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install mlx mlx-cpu")
    parts = LAYOUTS["mlx"].write(stored(ZEROS), QuantFormat(4, G, (), "mlx"))
    arrays = {name: mlx.array(part.numpy()) for name, part in parts.items()}
    found = mlx.dequantize(arrays["weight"], arrays["scales"], arrays["biases"], group_size=G, bits=4)
    assert found.tolist() == Quantized(CODES, SCALES, ZEROS, G).dequantize().tolist()


def test_compressed_tensors_unpacks_our_words() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    parts = LAYOUTS["compressed-tensors"].write(
        stored(ZEROS), QuantFormat(4, G, (), "compressed-tensors", False)
    )
    codes = helpers.unpack_from_int32(parts["weight_packed"], 4, torch.Size(parts["weight_shape"].tolist()))
    zeros = helpers.unpack_from_int32(parts["weight_zero_point"], 4, torch.Size([N, 1]), packed_dim=0)
    assert torch.equal(codes.int() - zeros.int(), CODES.int() - ZEROS.int())


FORMATS = [
    QuantFormat(4, G),
    QuantFormat(4, G, (), "compressed-tensors"),
    QuantFormat(4, G, (), "gptq"),
    QuantFormat(4, G, (), "gptq", False, 1),
    QuantFormat(4, G, (), "mlx"),
]


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_written_is_read_back_and_stated(fmt: QuantFormat) -> None:
    layout = LAYOUTS[fmt.method]
    if fmt.zero_offset:
        zeros = ZEROS + 1  # v1 borrows from the next nibble where a zero point is 0
    else:
        zeros = ZEROS
    parts = layout.write(stored(zeros), fmt)
    expected = layout.expected((N, K), fmt)
    assert {name: part.shape for name, part in parts.items()} == {n: s for n, (_, s) in expected.items()}
    assert all(part.dtype in expected[name][0] for name, part in parts.items())
    found = LinearWeights.from_stored(layout.read("m", parts, fmt), G).weight
    assert isinstance(found, Quantized)
    assert torch.equal(found.codes, CODES) and torch.equal(found.zeros, zeros)
    assert torch.equal(found.scales, SCALES)
    again = parse_quantization(layout.document(fmt, []))
    assert again == fmt


def test_v1_zeros_are_read_as_whole_words() -> None:
    """z - 1 of a zero point 0 borrows from its neighbour; taking one off the whole word and adding it again is exact."""
    fmt = QuantFormat(4, G, (), "gptq", False, 1)
    parts = LAYOUTS["gptq"].write(stored(ZEROS), fmt)
    assert hexed(parts["qzeros"]) == [["654320FF"]]  # 76543210 - 11111111
    assert LAYOUTS["gptq"].read("m", parts, fmt)["zeros"].tolist() == [list(range(8))]


@pytest.mark.parametrize("skipped", [[], ["lm_head", "mlp.down_proj", "model.layers.3.mlp.gate"]])
@pytest.mark.parametrize("method", ["awq", "compressed-tensors", "gptq"])
def test_float_linears_are_stated(method: Method, skipped: list[str]) -> None:
    document = LAYOUTS[method].document(QuantFormat(4, G, (), method), skipped)
    found = parse_quantization(document)
    assert found is not None
    wanted = [name for name in skipped if method != "gptq" or name != "lm_head"]  # GPTQ states its head apart
    assert list(found.modules_to_not_convert) == wanted


def gptq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False} | changes


def compressed(weights: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    plain = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    group = {"targets": ["Linear"], "weights": plain | (weights or {}), "input_activations": None} | changes
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }


@pytest.mark.parametrize(
    ("quant", "word"),
    [
        (gptq(desc_act=True), "desc_act"),
        (gptq(bits=8), "bits"),
        (gptq(group_size=-1), "group_size"),
        (gptq(checkpoint_format="marlin"), "checkpoint_format"),
        (gptq(sym="yes"), "sym"),
        (gptq(dynamic={"+:.*down.*": {"bits": 8}}), "dynamic"),
        (compressed({"num_bits": 8}), "num_bits"),
        (compressed({"strategy": "channel"}), "strategy"),
        (compressed({"actorder": "group"}), "actorder"),
        (compressed(input_activations={"num_bits": 8}), "activations"),
        (compressed() | {"format": "marlin-24"}, "marlin-24"),
        (compressed() | {"config_groups": {}}, "config_groups"),
        ({"group_size": 64, "bits": 8}, "bits"),
        ({"group_size": 64, "bits": 4, "mode": "mxfp4"}, "mode"),
        ({"group_size": 64, "bits": 4, "model.layers.0": {"bits": 8}}, "settings of their own"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_what_is_not_read_is_refused_by_name(quant: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        parse_quantization({"quantization_config": quant})


def test_columns_in_another_order_are_refused() -> None:
    fmt = QuantFormat(4, G, (), "gptq")
    parts = LAYOUTS["gptq"].write(stored(ZEROS), fmt)
    parts["g_idx"] = torch.ones_like(parts["g_idx"])
    with pytest.raises(InputError, match="act-order"):
        LAYOUTS["gptq"].read("model.x", parts, fmt)


def test_a_wrong_weight_shape_is_refused() -> None:
    fmt = QuantFormat(4, G, (), "compressed-tensors")
    parts = LAYOUTS["compressed-tensors"].write(stored(ZEROS), fmt)
    parts["weight_shape"] = torch.tensor([N, K + 8])
    with pytest.raises(InputError, match="weight_shape"):
        LAYOUTS["compressed-tensors"].read("model.x", parts, fmt)


def test_scales_that_float16_does_not_hold_are_refused() -> None:
    fmt = QuantFormat(4, G, (), "compressed-tensors", True)
    parts = LAYOUTS["compressed-tensors"].write(stored(EIGHTS), fmt)
    exact = parts | {"weight_scale": parts["weight_scale"].bfloat16()}
    assert torch.equal(LAYOUTS["compressed-tensors"].read("m", exact, fmt)["scales"], SCALES.t())
    with pytest.raises(InputError, match="scales"):
        LAYOUTS["compressed-tensors"].read("m", parts | {"weight_scale": SCALES.float() * 2**-24}, fmt)


def test_every_zero_point_comes_back_from_a_rounded_offset() -> None:
    """All float16 scales times all zero points: the offset is rounded, the integer is found again, or float16 is too small."""
    scales = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)[:, None]
    zeros = torch.arange(16, dtype=torch.uint8)[None].expand(len(scales), 16)
    fits = 15 * scales[:, 0].float() < 65504
    small, few = scales[fits], zeros[fits]
    wide = small.expand(-1, 16)
    assert torch.equal(whole_zeros("m", wide, rounded_offsets(wide, few)), few)
    with pytest.raises(InputError, match="65504"):
        rounded_offsets(scales[~fits], zeros[~fits][:, :1] + 15)


def test_offsets_between_whole_multiples_are_refused() -> None:
    with pytest.raises(InputError, match="no whole multiple"):
        whole_zeros("m", torch.ones(1, 2).half(), torch.tensor([[-3.0, -3.5]]).half())
    with pytest.raises(InputError, match="not above 0"):
        whole_zeros("m", -torch.ones(1, 2).half(), torch.tensor([[-3.0, -3.0]]).half())
