"""The AWQ checkpoint: an independent reader finds our integers, config.json is what loaders expect, the same input gives the
same bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import CONFIGS, LAYERS, random_tensors, write_model

from convert.awq.writer import AwqWriter, required_bytes
from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights
from convert.config import QuantFormat
from convert.errors import InputError
from convert.folder.output import OutputFolder, read_manifest
from convert.readers import open_checkpoint
from kernels.int4 import Quantized, quantize

GROUP = 32


def packed_block(block: BlockWeights, bits: int = 4, keep: tuple[str, ...] = ()) -> BlockWeights:
    """The block with its linears rounded to nearest, the router and `keep` left float."""
    linears = {
        role: linear
        if role == "router" or role in keep
        else LinearWeights(quantize(linear.weight, bits, GROUP), linear.bias)
        for role, linear in block.linears.items()
    }
    return BlockWeights(block.index, linears, block.norms)


def write_awq(ckpt: Checkpoint, out: Path, bits: int = 4, keep: tuple[str, ...] = ()) -> None:
    """Write and finish an AWQ checkpoint by rounding to nearest."""
    with OutputFolder.begin(out, {"source": ckpt.digest(), "bits": bits}) as folder:
        writer = AwqWriter(folder, ckpt, QuantFormat(bits, GROUP, keep))
        for i in range(ckpt.config.num_layers):
            writer.write_block(i, packed_block(ckpt.block(i), bits, keep))
        writer.finish_files()
        folder.finish({"kind": "awq", "bits": bits})


def autoawq_decode(folder: Path, module: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (K, N), zeros (G, N) and weights (K, N) of a module, by the AutoAWQ "gemm" text, one nibble at a time.

    Column 8 w + [0, 2, 4, 6, 1, 3, 5, 7][i] is nibble i (bits 4 i .. 4 i + 3) of word w; weight = (code - zero) * scale.
    """
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    parts = {}
    for part in ("qweight", "qzeros", "scales"):
        name = f"{module}.{part}"
        with safe_open(folder / index[name], framework="np") as file:
            parts[part] = file.get_tensor(name)

    def nibbles(words: np.ndarray) -> np.ndarray:
        unsigned = words.view(np.uint32)
        columns = np.zeros((words.shape[0], words.shape[1] * 8), dtype=np.int64)
        for row in range(words.shape[0]):
            for word in range(words.shape[1]):
                for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    columns[row, 8 * word + column] = (int(unsigned[row, word]) >> (4 * nibble)) & 15
        return columns

    codes, zeros = nibbles(parts["qweight"]), nibbles(parts["qzeros"])
    repeated = np.repeat(zeros, GROUP, axis=0), np.repeat(parts["scales"].astype(np.float32), GROUP, axis=0)
    return codes, zeros, (codes - repeated[0]) * repeated[1]


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_an_independent_reader_finds_our_integers(bits: int, tmp_path) -> None:
    write_model(tmp_path / "m")
    ckpt = open_checkpoint(tmp_path / "m")
    write_awq(ckpt, tmp_path / "q", bits)
    for role, module in (("q", "self_attn.q_proj"), ("down", "mlp.down_proj"), ("k", "self_attn.k_proj")):
        expected = quantize(ckpt.block(1).linears[role].weight, bits, GROUP)
        codes, zeros, weights = autoawq_decode(tmp_path / "q", f"model.layers.1.{module}")
        assert np.array_equal(codes.T, expected.codes.numpy())
        assert np.array_equal(zeros.T, expected.zeros.numpy())
        assert np.array_equal(weights.T, expected.dequantize().numpy())
    quant = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert quant["bits"] == 4  # what other loaders need to know: nibbles
    assert read_manifest(tmp_path / "q").data["bits"] == bits
    again = open_checkpoint(tmp_path / "q")
    assert again.config.quantization is not None and again.config.quantization.bits == bits


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_read_back_bit_for_bit(family: str, tmp_path) -> None:
    write_model(tmp_path / "m", family)
    ckpt = open_checkpoint(tmp_path / "m")
    write_awq(ckpt, tmp_path / "q")
    again = open_checkpoint(tmp_path / "q")
    assert again.kind == "awq" and again.notes == ckpt.notes
    for i in range(LAYERS):
        expected, found = packed_block(ckpt.block(i)), again.block(i)
        assert found.linears.keys() == expected.linears.keys()
        for role, linear in expected.linears.items():
            if isinstance(linear.weight, Quantized):
                for part in ("codes", "scales", "zeros"):
                    assert torch.equal(
                        getattr(found.linears[role].weight, part), getattr(linear.weight, part)
                    ), role
            else:
                assert torch.equal(found.linears[role].weight, linear.weight)
            assert linear.bias is None or torch.equal(found.linears[role].bias, linear.bias)
        assert all(torch.equal(found.norms[role], norm) for role, norm in expected.norms.items())
    assert torch.equal(again.embedding(), ckpt.embedding()) and torch.equal(again.lm_head(), ckpt.lm_head())


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_of_the_source_is_there(family: str, tmp_path) -> None:
    """By its published name, packed or as it was: fused tensors are joined again."""
    source = write_model(tmp_path / "m", family)
    write_awq(open_checkpoint(tmp_path / "m"), tmp_path / "q")
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())["weight_map"]
    expected = set()
    for name, tensor in source.items():
        module = name.removesuffix(".weight")
        packed = (tensor.dim() == 2 and ".layers." in name) or (".h." in name and tensor.dim() == 2)
        if packed and not module.endswith("block_sparse_moe.gate"):
            expected |= {f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
        else:
            expected.add(name)
    assert set(index) == expected


def test_config_for_other_loaders(tmp_path) -> None:
    write_model(tmp_path / "m", torch_dtype="bfloat16")
    write_awq(open_checkpoint(tmp_path / "m"), tmp_path / "q", keep=("down",))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head", "mlp.down_proj"],
    }
    block = open_checkpoint(tmp_path / "q").block(0)
    assert isinstance(block.linears["down"].weight, torch.Tensor) and isinstance(
        block.linears["up"].weight, Quantized
    )


def test_what_lies_beside_the_weights_is_copied_and_never_run(tmp_path) -> None:
    write_model(tmp_path / "m", auto_map={"AutoModelForCausalLM": "modeling.M"})
    beside = {
        "tokenizer.json": "{}",
        "generation_config.json": '{"eos_token_id": 2}',
        "chat_template.jinja": "{{ messages }}",
        "modeling.py": "raise SystemExit('ran')",
        "LICENSE": "x",
        "tokenizer.model": "y",
    }
    for name, text in beside.items():
        (tmp_path / "m" / name).write_text(text)
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"pickle")
    write_awq(open_checkpoint(tmp_path / "m"), tmp_path / "q")
    for name, text in beside.items():
        assert (tmp_path / "q" / name).read_text() == text
    assert not (tmp_path / "q" / "pytorch_model.bin").exists()
    assert json.loads((tmp_path / "q" / "config.json").read_text())["auto_map"] == {
        "AutoModelForCausalLM": "modeling.M"
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_input_same_bytes_also_after_a_stop(tmp_path) -> None:
    write_model(tmp_path / "m")
    ckpt = open_checkpoint(tmp_path / "m")
    write_awq(ckpt, tmp_path / "one")
    fingerprint = {"source": ckpt.digest(), "bits": 4}
    with OutputFolder.begin(tmp_path / "two", fingerprint) as folder:
        writer = AwqWriter(folder, ckpt, QuantFormat(4, GROUP))
        writer.write_block(0, packed_block(ckpt.block(0)))
    with OutputFolder.begin(tmp_path / "two", fingerprint) as folder:
        assert folder.resumed
        writer = AwqWriter(folder, ckpt, QuantFormat(4, GROUP))
        assert writer.finished_blocks() == 1 and writer.has_block(0) and not writer.has_block(1)
        writer.write_block(1, packed_block(ckpt.block(1)))
        writer.finish_files()
        folder.finish({"kind": "awq", "bits": 4})
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_A15_values_beyond_float16_are_named_and_counted(tmp_path) -> None:
    tensors = random_tensors("llama", torch.float32)
    name = "model.layers.1.post_attention_layernorm.weight"
    tensors[name][:3] = 70000.0
    write_model(tmp_path / "m", tensors=tensors)
    ckpt = open_checkpoint(tmp_path / "m")
    with pytest.raises(InputError, match=rf"float16.*{name} \(3 of 64\)"):
        write_awq(ckpt, tmp_path / "q")
    with pytest.raises(InputError, match="unfinished"):
        open_checkpoint(tmp_path / "q")


def test_the_estimate_covers_the_files(tmp_path) -> None:
    write_model(tmp_path / "m")
    ckpt = open_checkpoint(tmp_path / "m")
    write_awq(ckpt, tmp_path / "q")
    assert required_bytes(ckpt.config, tmp_path / "m") >= sum(
        len(data) for data in files_of(tmp_path / "q").values()
    )


def test_codes_above_the_declared_bits_are_refused(tmp_path) -> None:
    """The manifest says 3 bits, but the shard holds int4 codes."""
    write_model(tmp_path / "m")
    ckpt = open_checkpoint(tmp_path / "m")
    with OutputFolder.begin(tmp_path / "q", {}) as folder:
        writer = AwqWriter(folder, ckpt, QuantFormat(4, GROUP))
        for i in range(LAYERS):
            writer.write_block(i, packed_block(ckpt.block(i)))
        writer.finish_files()
        folder.finish({"kind": "awq", "bits": 3})
    with pytest.raises(InputError, match="declares 3 bits"):
        open_checkpoint(tmp_path / "q").block(0)


def test_compressed_tensors_finds_our_integers(tmp_path) -> None:
    """vLLM's converter for AutoAWQ files, where that package is installed; its codes are shifted by 8."""
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    write_model(tmp_path / "m")
    ckpt = open_checkpoint(tmp_path / "m")
    write_awq(ckpt, tmp_path / "q")
    quant = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    converter = converters.AutoAWQConverter.from_autoawq_config(quant)
    tensors = load_file(tmp_path / "q" / "model-00001-of-00003.safetensors")
    converter.validate(tensors)
    found = converter.process(tensors)
    for role, module in (("q", "self_attn.q_proj"), ("up", "mlp.up_proj"), ("down", "mlp.down_proj")):
        expected, name = quantize(ckpt.block(0).linears[role].weight, 4, GROUP), f"model.layers.0.{module}."
        codes = helpers.unpack_from_int32(found[name + "weight_packed"], 4, expected.codes.shape)
        zeros = helpers.unpack_from_int32(
            found[name + "weight_zero_point"], 4, expected.zeros.shape, packed_dim=0
        )
        assert torch.equal(codes.int() + 8, expected.codes.int()) and torch.equal(
            zeros.int() + 8, expected.zeros.int()
        )
        assert torch.equal(found[name + "weight_scale"], expected.scales)
