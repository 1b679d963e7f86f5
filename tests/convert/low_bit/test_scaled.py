"""8-bit sources read by the rule of their format, against the libraries that define them; int4 sources as floats."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from torch import Tensor
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

import turbomind_quant as tmq
from convert.awq.writer import AwqWriter
from convert.checkpoint import LinearWeights
from convert.config import QuantFormat
from convert.errors import InputError
from convert.folder.output import OutputFolder
from convert.readers import open_checkpoint
from kernels.int4 import quantize
from quant.session import open_float_model

BLOCK = (40, 24)  # divides no size of the tiny model: the last blocks are cut short
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}


def compressed(strategy: str, kind: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False} | more
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if kind == "float" else "int-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}
        },
        "ignore": ["lm_head"],
    }


# name -> (quantization_config, shape of the scales of a weight (N, K), dtype of the values)
CASES: dict[str, tuple[dict[str, Any], Any, torch.dtype]] = {
    "fp8 in blocks": (FP8, lambda n, k: (-(-n // BLOCK[0]), -(-k // BLOCK[1])), torch.float8_e4m3fn),
    "fp8 a tensor": (FP8 | {"weight_block_size": None}, lambda n, k: (), torch.float8_e4m3fn),
    "compressed fp8 a tensor": (compressed("tensor", "float"), lambda n, k: (1,), torch.float8_e4m3fn),
    "compressed fp8 a row": (compressed("channel", "float"), lambda n, k: (n, 1), torch.float8_e4m3fn),
    "compressed int8 a row": (compressed("channel", "int"), lambda n, k: (n, 1), torch.int8),
    "compressed int8 a group": (
        compressed("group", "int", group_size=32),
        lambda n, k: (n, k // 32),
        torch.int8,
    ),
}


def write_low_bit(
    folder: Path, name: str, zero_points: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A tiny Llama with its linears in this format; returns its tensors and, by module, what its own library makes of each."""
    quant, shape_of, dtype = CASES[name]
    generator = torch.Generator().manual_seed(3)
    tensors, wanted = {}, {}
    part = "weight_scale_inv" if quant["quant_method"] == "fp8" else "weight_scale"
    for key, tensor in tiny_models.random_tensors("llama", torch.bfloat16).items():
        if "_proj" not in key:
            tensors[key] = tensor
            continue
        module = key.removesuffix(".weight")
        rows, cols = tensor.shape
        if dtype == torch.int8:
            values = torch.randint(-128, 128, (rows, cols), generator=generator, dtype=torch.int8)
        else:
            values = (torch.randn(rows, cols, generator=generator) * 100).clamp(-440, 440).to(dtype)
        scale = torch.rand(shape_of(rows, cols), generator=generator) * 1e-3 + 1e-4
        tensors |= {key: values, f"{module}.{part}": scale}
        zero = None
        if zero_points:
            zero = torch.randint(-9, 9, scale.shape, generator=generator, dtype=torch.int8)
            tensors[module + ".weight_zero_point"] = zero
        wanted[module] = reference(quant, values, scale, zero)
    tensors["model.layers.0.self_attn.k_proj.input_scale"] = torch.ones(1)
    tiny_models.write_model(folder, tensors=tensors, torch_dtype="bfloat16", quantization_config=quant)
    return tensors, wanted


def reference(quant: dict[str, Any], values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    if quant["quant_method"] == "fp8":
        return _dequantize_fp8_weight(values, scale, quant["weight_block_size"], torch.float32)
    arguments = QuantizationArgs(**quant["config_groups"]["group_0"]["weights"])
    return dequantize(values, scale, zero, arguments, dtype=torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_formats_own_library(name: str, tmp_path: Path) -> None:
    _, wanted = write_low_bit(tmp_path / "m", name)
    ckpt = open_checkpoint(tmp_path / "m")
    assert ckpt.config.quantization is None and any("quantized already" in note for note in ckpt.notes)
    roles = {
        "q": "self_attn.q",
        "v": "self_attn.v",
        "o": "self_attn.o",
        "gate": "mlp.gate",
        "down": "mlp.down",
    }
    for index in range(tiny_models.LAYERS):
        block = ckpt.block(index)
        for role, module in roles.items():
            found = block.linears[role].weight
            assert isinstance(found, Tensor) and found.dtype == torch.float32
            assert torch.equal(found, wanted[f"model.layers.{index}.{module}_proj"])


def test_zero_points_are_taken_off_first(tmp_path: Path) -> None:
    _, wanted = write_low_bit(tmp_path / "m", "compressed int8 a group", zero_points=True)
    found = open_checkpoint(tmp_path / "m").block(0).linears["up"].weight
    assert isinstance(found, Tensor)
    assert torch.equal(found, wanted["model.layers.0.mlp.up_proj"])


def test_an_fp8_source_is_quantized_and_every_tensor_accounted_for(tmp_path: Path) -> None:
    tensors, _ = write_low_bit(tmp_path / "m", "fp8 in blocks")
    tmq.quantize(tmp_path / "m", tmp_path / "q", preset="rtn", group_size=32, device="cpu")
    manifest = json.loads((tmp_path / "q" / "tmq" / "manifest.json").read_text())
    found = manifest["tensors"]
    assert found["quantized"] == 14 and len(found["dropped"]) == 15 and not found["carried"]
    assert found["quantized"] + found["float"] + len(found["dropped"]) == len(tensors)
    assert all("FP8" in reason for reason in found["dropped"].values())
    assert "fp8" not in (tmp_path / "q" / "config.json").read_text()


def test_scales_that_do_not_cover_the_weight_are_refused(tmp_path: Path) -> None:
    tensors, _ = write_low_bit(tmp_path / "m", "fp8 in blocks")
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"
    tensors[name] = tensors[name][:, :-1].contiguous()
    tiny_models.write_model(tmp_path / "m", tensors=tensors, torch_dtype="bfloat16", quantization_config=FP8)
    with pytest.raises(InputError, match=r"down_proj.*do not cover a weight of \[64, 96\]"):
        open_checkpoint(tmp_path / "m").block(1)


def test_nan_in_a_weight_is_refused_by_name(tmp_path: Path) -> None:
    tensors, _ = write_low_bit(tmp_path / "m", "fp8 a tensor")
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[3, 5] = 0x7F
    tiny_models.write_model(
        tmp_path / "m", tensors=tensors, quantization_config=FP8 | {"weight_block_size": None}
    )
    with pytest.raises(InputError, match=r"up_proj.*1 NaN"):
        open_checkpoint(tmp_path / "m").block(0)


@pytest.mark.parametrize("method", ["mxfp4", "bitsandbytes", "modelopt"])
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    tiny_models.write_model(tmp_path / "m", quantization_config={"quant_method": method})
    with pytest.raises(InputError, match=method):
        open_checkpoint(tmp_path / "m")


def write_symmetric(source: Path, folder: Path) -> None:
    """A tiny AWQ checkpoint whose zero points are all 8, which GPTQ can hold."""
    tiny_models.write_model(source)
    ckpt = open_checkpoint(source)
    with OutputFolder.begin(folder, {}) as out:
        writer = AwqWriter(out, ckpt, QuantFormat(4, 32))
        for index in range(ckpt.config.num_layers):
            block = ckpt.block(index)
            linears = {}
            for role, part in block.linears.items():
                assert isinstance(part.weight, Tensor)
                made = quantize(part.weight, 4, 32)
                linears[role] = LinearWeights(replace(made, zeros=torch.full_like(made.zeros, 8)), part.bias)
            writer.write_block(index, replace(block, linears=linears))
        writer.finish_files()
        out.finish({"kind": "awq", "bits": 4})


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"])
def test_an_int4_checkpoint_of_another_method_is_a_source(kind: str, tmp_path: Path) -> None:
    write_symmetric(tmp_path / "m", tmp_path / "q")
    tmq.pack(tmp_path / "q", tmp_path / "p", format=kind)
    ckpt = open_float_model(tmp_path / "p")
    assert ckpt.config.quantization is None and any("quantized already" in note for note in ckpt.notes)
    before, after = open_checkpoint(tmp_path / "q").block(1), ckpt.block(1)
    for role, part in before.linears.items():
        found = after.linears[role].weight
        assert isinstance(found, Tensor) and not isinstance(part.weight, Tensor)
        assert torch.equal(found, part.weight.dequantize())
    tmq.quantize(tmp_path / "p", tmp_path / "again", preset="rtn", group_size=32, device="cpu")
