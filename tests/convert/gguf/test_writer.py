"""`quantize pack --format gguf`: blocks by hand, llama.cpp's own package reads our weights, codes come back, the tokenizer is the same."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import LAYERS, write_model
from torch import Tensor

from convert.awq.writer import AwqWriter
from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights
from convert.config import QuantFormat
from convert.errors import InputError
from convert.folder.output import OutputFolder
from convert.gguf.blocks import pack_blocks, unpack_blocks
from convert.gguf.writer import permute
from convert.pack.run import PackOptions, open_source, pack_checkpoint
from convert.readers import open_checkpoint
from convert.tokenizer.tokenizer import load_tokenizer
from engine.model.attention import causal_attend
from engine.model.forward import Model
from kernels.int4 import Quantized, quantize

GROUP = 32
VOCAB = 264


def stored(codes: list[int], scale: float, zero: int) -> Quantized:
    return Quantized(
        torch.tensor([codes], dtype=torch.uint8).repeat(8, 1),
        torch.full((8, 1), scale).half(),
        torch.full((8, 1), zero, dtype=torch.uint8),
        GROUP,
    )


def test_a_q4_1_block_by_hand() -> None:
    """Codes 0..15, 15..0; scale 0.5, zero point 3: d = 0x3800, m = -1.5 = 0xBE00; byte b holds code b and code b + 16."""
    codes = [*range(16), *range(15, -1, -1)]
    block = pack_blocks(LinearWeights(stored(codes, 0.5, 3)).stored(), GROUP, symmetric=False)
    assert block.shape == (8, 20)
    wanted = "0038" + "00be" + "f0e1d2c3b4a5968778695a4b3c2d1e0f"
    assert bytes(block[0].tolist()).hex() == wanted


def test_a_q4_0_block_by_hand() -> None:
    codes = [*range(16), *range(15, -1, -1)]
    block = pack_blocks(LinearWeights(stored(codes, 0.5, 8)).stored(), GROUP, symmetric=True)
    assert bytes(block[0].tolist()).hex() == "0038" + "f0e1d2c3b4a5968778695a4b3c2d1e0f"


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_package_dequantizes_our_blocks(group: int) -> None:
    generator = torch.Generator().manual_seed(1)
    made = quantize(torch.randn(16, 256, generator=generator), 4, group)
    eights = Quantized(made.codes, made.scales, torch.full_like(made.zeros, 8), group)
    packed = pack_blocks(LinearWeights(eights).stored(), group, symmetric=True)
    found = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(found, eights.dequantize().numpy())  # exact
    packed = pack_blocks(LinearWeights(made).stored(), group, symmetric=False)
    found = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType.Q4_1)
    error = (
        np.abs(found - made.dequantize().numpy()) / made.scales.float().repeat_interleave(group, 1).numpy()
    )
    assert 0 < error.max() <= 0.0073
    again = LinearWeights.from_stored(unpack_blocks("w", packed, "Q4_1", group), group).weight
    assert isinstance(again, Quantized)
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(again, name), getattr(made, name))


def test_the_loss_of_a_rounded_minimum_is_bounded() -> None:
    """Over all float16 scales that are normal numbers and all zero points: at most 0.0073 of a step, none for 0, 1, 2, 4, 8."""
    scales = torch.arange(0x0400, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    for zero in range(16):
        exact = zero * scales
        fits = exact < 65504
        error = ((exact.half().float() - exact).abs() / scales)[fits]
        assert float(error.max()) <= 0.0073
        if zero in (0, 1, 2, 4, 8):
            assert float(error.max()) == 0.0


def test_rows_of_q_and_k_become_pairs() -> None:
    """Two heads of dimension 4: the new rows 0, 1 of a head are the old rows 0 and 2."""
    rows = torch.arange(8)[:, None]
    assert permute(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def write_awq(
    folder: Path, family: str, *, group: int = GROUP, symmetric: bool = False, keep: tuple[str, ...] = ()
) -> Path:
    """A tiny AWQ checkpoint with a byte-level tokenizer; K of every linear is a multiple of 128 where group is 128."""
    sizes = {"vocab_size": VOCAB} | ({"hidden_size": 128, "intermediate_size": 256} if group > 32 else {})
    source = folder.with_name(folder.name + "-float")
    tensors = tiny_models.random_tensors(family, **sizes)
    write_model(source, family, tensors=tensors, bos_token_id=257, eos_token_id=259, **sizes)
    document = tiny_models.tokenizer_document()
    document["model"]["vocab"]["ab"] = 256
    for entry in document["added_tokens"]:
        entry["id"] += 1
    document["model"]["merges"] = [["a", "b"]]
    (source / "tokenizer.json").write_text(json.dumps(document))
    settings = {
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "chat_template": "{{ messages[0].content }}",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    ckpt = open_checkpoint(source)
    with OutputFolder.begin(folder, {}) as out:
        writer = AwqWriter(out, ckpt, QuantFormat(4, group, keep))
        for index in range(ckpt.config.num_layers):
            block = ckpt.block(index)
            linears = {}
            for role, linear in block.linears.items():
                assert isinstance(linear.weight, Tensor)
                weight: Tensor | Quantized = linear.weight
                if role != "router" and role not in keep:
                    made = quantize(linear.weight, 4, group)
                    eights = torch.full_like(made.zeros, 8)
                    weight = Quantized(made.codes, made.scales, eights, group) if symmetric else made
                linears[role] = LinearWeights(weight, linear.bias)
            writer.write_block(index, BlockWeights(index, linears, block.norms))
        writer.finish_files()
        out.finish({"kind": "awq", "bits": 4})
    return folder


def logits(ckpt: Checkpoint) -> Tensor:
    ids = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(0))
    model = Model.from_checkpoint(ckpt, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return torch.as_tensor(model(ids, torch.arange(len(ids)), causal_attend(1, len(ids), model.config)))


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral")


@pytest.mark.parametrize("symmetric", [False, True], ids=["Q4_1", "Q4_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_logits_and_codes_come_back(family: str, symmetric: bool, tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", family, symmetric=symmetric))
    result = pack_checkpoint(source, tmp_path / "out", "gguf")
    assert result.files == 1 and (tmp_path / f"out/model-{'Q4_0' if symmetric else 'Q4_1'}.gguf").is_file()
    cache = tmp_path / "cache"
    found = open_checkpoint(tmp_path / "out", cache_dir=cache)
    assert found.config.family == ("llama" if family == "mistral" else family)
    for index in range(LAYERS):
        ours, theirs = found.block(index), source.block(index)
        for role, linear in theirs.linears.items():
            weight = linear.weight
            if isinstance(weight, Quantized):
                steps = weight.scales.float().repeat_interleave(weight.group_size, dim=1)
                error = (torch.as_tensor(ours.linears[role].weight) - weight.dequantize()).abs() / steps
                assert float(error.max()) <= (0.0 if symmetric else 0.0073)
            else:
                assert torch.equal(torch.as_tensor(ours.linears[role].weight), weight.float())
            bias = linear.bias
            if bias is not None:
                assert torch.equal(torch.as_tensor(ours.linears[role].bias), bias.float())
        assert all(torch.equal(ours.norms[role], norm.float()) for role, norm in theirs.norms.items())
    if family != "mistral":  # its window has no place in the file
        distance = (logits(found) - logits(source)).norm() / logits(source).norm()
        assert float(distance) <= (1e-6 if symmetric else 2e-3)
    codes = open_source(tmp_path / "out", "awq", cache_dir=cache)
    pack_checkpoint(codes, tmp_path / "back", "awq")
    for path in sorted((tmp_path / "awq").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


@pytest.mark.parametrize("group", [64, 128])
def test_larger_groups_come_back_as_they_were(group: int, tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", "llama", group=group))
    pack_checkpoint(source, tmp_path / "out", "gguf")
    codes = open_source(tmp_path / "out", "awq", cache_dir=tmp_path / "cache")
    assert codes.config.quantization is not None and codes.config.quantization.group_size == group
    pack_checkpoint(codes, tmp_path / "back", "awq")
    assert (tmp_path / "awq/model-00001-of-00003.safetensors").read_bytes() == (
        tmp_path / "back/model-00001-of-00003.safetensors"
    ).read_bytes()


def test_metadata_that_llama_cpp_asks_for(tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", "llama"))
    pack_checkpoint(source, tmp_path / "out", "gguf", PackOptions(rest="q8_0"))
    reader = gguf.GGUFReader(tmp_path / "out/model-Q4_1.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.file_type"] == 3
    assert fields["llama.block_count"] == LAYERS and fields["llama.attention.head_count_kv"] == tiny_models.KV
    assert fields["llama.attention.key_length"] == tiny_models.DIM == fields["llama.rope.dimension_count"]
    assert fields["llama.vocab_size"] == VOCAB == len(fields["tokenizer.ggml.tokens"])
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert fields["tokenizer.ggml.eos_token_id"] == 259 and fields["tokenizer.ggml.add_bos_token"] is False
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == "F32" and types["blk.1.ffn_down.weight"] == "Q4_1"


def test_the_tokenizer_comes_back(tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", "llama"))
    pack_checkpoint(source, tmp_path / "out", "gguf")
    again = load_tokenizer(open_checkpoint(tmp_path / "out", cache_dir=tmp_path / "cache").tokenizer_dir)
    before = load_tokenizer(tmp_path / "awq")
    text = "Tabs\tand 1234 café <|im_end|> don't"
    assert again.encode(text) == before.encode(text) and again.bos_id == before.bos_id
    assert again.eos_token_ids == before.eos_token_ids and again.has_chat_template


def test_an_unknown_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_awq(tmp_path / "awq", "llama")
    path = tmp_path / "awq-float/tokenizer.json"
    document = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}
    (tmp_path / "awq").joinpath("tokenizer.json").unlink()
    (tmp_path / "other").mkdir()
    for file in folder.rglob(
        "*"
    ):  # a foreign folder: without the manifest that holds the digest of its tokenizer
        if file.is_file() and "tmq" not in file.parts:
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="pre-tokenizer"):
        pack_checkpoint(open_checkpoint(tmp_path / "other"), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_families_without_a_form_are_refused(tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", "llama"))
    source.config = source.config.__class__(**{**source.config.__dict__, "family": "internlm"})
    with pytest.raises(InputError, match="internlm"):
        pack_checkpoint(source, tmp_path / "out", "gguf")


def test_llama3_scaling_is_a_tensor_of_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder = write_awq(tmp_path / "awq", "llama")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other").mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    config |= {
        "rope_scaling": scaling,
        "rope_parameters": scaling | {"rope_theta": 500000.0},
        "rope_theta": 500000.0,
    }
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    source = open_checkpoint(tmp_path / "other")
    pack_checkpoint(source, tmp_path / "out", "gguf")
    found = open_checkpoint(tmp_path / "out", cache_dir=tmp_path / "cache")
    assert found.config.rope_scaling == source.config.rope_scaling and found.config.rope_theta == 500000.0


def test_minima_of_other_programs_are_no_codes(tmp_path: Path) -> None:
    from tiny_gguf import write_gguf

    write_gguf(tmp_path / "model.gguf")
    source = open_source(tmp_path / "model.gguf", "gguf", cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="no whole multiple"):
        pack_checkpoint(source, tmp_path / "out", "compressed-tensors")


@pytest.mark.parametrize(("group", "is_codes"), [(32, False), (128, True)])
def test_a_workspace_takes_the_codes_of_a_gguf_file_in_its_own_groups_alone(
    group: int, is_codes: bool, tmp_path: Path
) -> None:
    """Of other groups it takes the floats, as of any GGUF file."""
    pack_checkpoint(
        open_checkpoint(write_awq(tmp_path / "awq", "llama", group=group)), tmp_path / "out", "gguf"
    )
    source = open_source(tmp_path / "out", "turbomind", cache_dir=tmp_path / "cache")
    assert (source.config.quantization is not None) == is_codes


def test_linears_left_float_are_f16(tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", "llama", keep=("down",)))
    pack_checkpoint(source, tmp_path / "out", "gguf")
    reader = gguf.GGUFReader(tmp_path / "out/model-Q4_1.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q4_1"
    pack_checkpoint(
        open_source(tmp_path / "out", "awq", cache_dir=tmp_path / "cache"), tmp_path / "back", "awq"
    )
    assert (tmp_path / "awq/model-00002-of-00003.safetensors").read_bytes() == (
        tmp_path / "back/model-00002-of-00003.safetensors"
    ).read_bytes()


def test_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", "llama"))
    pack_checkpoint(source, tmp_path / "a", "gguf")
    pack_checkpoint(source, tmp_path / "b", "gguf")
    assert (tmp_path / "a/model-Q4_1.gguf").read_bytes() == (tmp_path / "b/model-Q4_1.gguf").read_bytes()
