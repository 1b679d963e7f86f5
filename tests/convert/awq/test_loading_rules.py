"""Rules by which today's loaders take an AWQ checkpoint, held against ours; and one loader that runs on a CPU, against our logits.

vLLM (model_executor/layers/quantization/awq.py, utils/quant_utils.py), LMDeploy 0.18 (lmdeploy/turbomind/weight_format.py, converter),
transformers 5 (quantizers/quantizers_utils.py), written here in our own words.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, random_tensors, shapes, write_model
from torch import Tensor

from convert.awq.writer import AwqWriter
from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import QuantFormat
from convert.folder.output import OutputFolder
from convert.readers import open_checkpoint
from engine.model.attention import causal_attend
from engine.model.forward import Model
from kernels.int4 import quantize

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "internlm", "internlm2", "qwen", "mixtral")


def write_awq(folder: Path, family: str, group: int, ragged: tuple[str, ...] = ()) -> Path:
    """A tiny AWQ checkpoint in the family's own names; roles of `ragged` stay float."""
    source = folder.with_name(folder.name + "-float")
    write_model(source, family)
    ckpt = open_checkpoint(source)
    with OutputFolder.begin(folder, {}) as out:
        writer = AwqWriter(out, ckpt, QuantFormat(4, group, ragged))
        for index in range(ckpt.config.num_layers):
            block = ckpt.block(index)
            linears = {}
            for role, linear in block.linears.items():
                assert isinstance(linear.weight, Tensor)
                stays = role in ragged or role == "router"
                weight = linear.weight if stays else quantize(linear.weight, 4, group)
                linears[role] = LinearWeights(weight, linear.bias)
            writer.write_block(index, BlockWeights(index, linears, block.norms))
        writer.finish_files()
        out.finish({"kind": "awq", "bits": 4})
    return folder


def contents(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json, and the tensors as loaders find them: every safetensors file at the top of the folder."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return json.loads((folder / "config.json").read_text()), tensors


def linears(tensors: dict[str, Tensor]) -> set[str]:
    return {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}


@pytest.fixture(params=FAMILIES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    return (request.param, *contents(write_awq(tmp_path / "q", request.param, 32)))


def test_config_states_what_each_loader_reads(checkpoint: Any) -> None:
    _, config, _ = checkpoint
    quant = config["quantization_config"]
    assert quant["quant_method"] == "awq" and quant["version"] == "gemm"  # LMDeploy, transformers
    assert quant["bits"] == 4 and quant["zero_point"] is True and isinstance(quant["group_size"], int)  # vLLM
    assert all(isinstance(name, str) for name in quant["modules_to_not_convert"])
    assert config["dtype"] == "float16"  # the activations of vLLM's plain AWQ kernel


def test_three_tensors_of_each_linear_have_the_loaders_shapes(checkpoint: Any) -> None:
    _, config, tensors = checkpoint
    group = config["quantization_config"]["group_size"]
    assert linears(tensors)
    for name in linears(tensors):
        qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        inputs, outputs = qweight.shape[0], scales.shape[1]
        assert (qweight.dtype, qzeros.dtype, scales.dtype) == (torch.int32, torch.int32, torch.float16)
        assert qweight.shape == (inputs, outputs // 8) and qweight.shape[1] * 8 == scales.shape[1]
        assert qzeros.shape == (inputs // group, outputs // 8) and scales.shape == (inputs // group, outputs)
        assert inputs % group == 0 and outputs % 8 == 0
        assert f"{name}.weight" not in tensors  # a float weight beside it would be taken for another format
        assert bool(torch.isfinite(scales).all()) and float(scales.min()) > 0


def test_every_other_tensor_keeps_its_name(checkpoint: Any) -> None:
    family, _, tensors = checkpoint
    stored = {re.sub(r"\.(qweight|qzeros|scales)$", ".weight", name) for name in tensors}
    assert stored == set(shapes(family))
    packed = ("qweight", "qzeros")
    assert all(t.dtype == torch.float16 for name, t in tensors.items() if not name.endswith(packed))


def skipped_by_vllm(name: str, entries: list[str]) -> bool:
    """A linear stays float where an entry is part of its name."""
    return any(entry in name for entry in entries)


def skipped_by_transformers(name: str, entries: list[str]) -> bool:
    """Where an entry matches from the start up to a dot, or is its end."""
    return any(
        re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(entry) for entry in entries
    )


@pytest.mark.parametrize("rule", [skipped_by_vllm, skipped_by_transformers])
def test_skipped_modules_are_exactly_the_float_linears(checkpoint: Any, rule: Any) -> None:
    _, config, tensors = checkpoint
    entries = config["quantization_config"]["modules_to_not_convert"]
    assert not [name for name in linears(tensors) if rule(name, entries)]
    matrices = [name for name, t in tensors.items() if name.endswith(".weight") and t.dim() == 2]
    embeddings = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight")
    for name in matrices:
        assert name.endswith(embeddings) or rule(name.removesuffix(".weight"), entries), name


@pytest.mark.parametrize("ragged", [("down",), ("o",), ("q", "k", "v"), ("gate", "up")])
@pytest.mark.parametrize("rule", [skipped_by_vllm, skipped_by_transformers])
def test_linears_left_in_float_are_listed(rule: Any, ragged: tuple[str, ...], tmp_path: Path) -> None:
    config, tensors = contents(write_awq(tmp_path / "q", "llama", 32, ragged))
    entries = config["quantization_config"]["modules_to_not_convert"]
    everything = {name.removesuffix(".weight") for name in random_tensors("llama") if "_proj." in name}
    assert {name for name in everything if rule(name, entries)} == everything - linears(tensors)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "internlm"])
def test_parts_that_vllm_fuses_have_one_format(family: str, tmp_path: Path) -> None:
    """q, k, v and gate, up become one matrix there: all packed or none, with the same number of groups."""
    config, tensors = contents(write_awq(tmp_path / "q", family, 32))
    blocks = {name.rsplit(".", 2)[0] for name in linears(tensors)}
    for parts in FUSED.values():
        for block in blocks:
            paths = [f"{block}.{kind}.{part}" for part in parts for kind in ("self_attn", "mlp")]
            rows = {tensors[f"{path}.scales"].shape[0] for path in paths if f"{path}.scales" in tensors}
            packed = [
                f"{path}.qweight" in tensors
                for path in paths
                if f"{path}.bias" in tensors or path in linears(tensors)
            ]
            assert len(rows) <= 1 and len(set(packed)) <= 1
    assert config["architectures"] == CONFIGS[family]["architectures"]


def test_the_index_names_every_tensor_and_shard(tmp_path: Path) -> None:
    folder = write_awq(tmp_path / "q", "llama", 32)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for path in folder.glob("*.safetensors"):
        assert all(index["weight_map"][name] == path.name for name in load_file(path))
    assert {path.name for path in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))


def test_lmdeploy_takes_groups_of_128_alone() -> None:
    from quant.config import QuantConfig

    assert QuantConfig().group_size == 128 and QuantConfig().bits == 4


def our_logits(folder: Path, ids: Tensor) -> Tensor:
    """(L, V) float32 of our own forward pass."""
    model = Model.from_checkpoint(open_checkpoint(folder), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        hidden = model(ids, torch.arange(len(ids)), causal_attend(1, len(ids), model.config))
    return torch.as_tensor(hidden)


def unpacked_elsewhere(folder: Path) -> dict[str, Tensor]:
    """Float weights as compressed-tensors' converter of AutoAWQ files and its unpacking understand ours."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    config, tensors = contents(folder)
    quant = config["quantization_config"]
    converter = AutoAWQConverter.from_autoawq_config(quant)
    converter.validate(tensors)
    names = linears(tensors)
    found = converter.process(tensors)
    assert not linears(found)
    for name in names:
        shape, scales = (
            torch.Size(found.pop(f"{name}.weight_shape").tolist()),
            found.pop(f"{name}.weight_scale"),
        )
        codes = unpack_from_int32(found.pop(f"{name}.weight_packed"), 4, shape)
        zeros = unpack_from_int32(found.pop(f"{name}.weight_zero_point"), 4, scales.shape, packed_dim=0)
        steps = (codes.float().unflatten(1, (-1, quant["group_size"])) - zeros.float()[..., None]).flatten(1)
        found[f"{name}.weight"] = steps * scales.float().repeat_interleave(quant["group_size"], dim=1)
    return {name: tensor.float() for name, tensor in found.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_another_reader_of_awq_files_finds_our_model(family: str, tmp_path: Path) -> None:
    """compressed-tensors unpacks the codes by its own rules, transformers computes with them."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors (extra dev) is not installed")
    from transformers import AutoModelForCausalLM

    folder = write_awq(tmp_path / "q", family, 32)
    (tmp_path / "hf").mkdir()
    config, _ = contents(folder)
    config.pop("quantization_config")
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    save_file(unpacked_elsewhere(folder), tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = torch.randint(0, 128, (24,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = other(ids[None]).logits[0].float()
    found = our_logits(folder, ids)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    assert bool((found.argmax(-1) == wanted.argmax(-1)).all())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gptqmodel_computes_our_model(family: str, tmp_path: Path) -> None:
    """transformers with GPT-QModel's torch kernel on a CPU; the folder is loaded as it is. The kernel computes in float16."""
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed (docs/FORMATS.md says how)")
    from transformers import AutoModelForCausalLM, AwqConfig

    folder = write_awq(tmp_path / "q", family, 32)
    other = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=torch.float16, quantization_config=AwqConfig(backend="torch_awq")
    )
    assert {type(m).__name__ for m in other.modules() if hasattr(m, "qweight")} == {"AwqTorchLinear"}
    ids = torch.randint(0, 128, (24,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = other(ids[None]).logits[0].float()
    found = our_logits(folder, ids)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2
    assert float((found.argmax(-1) == wanted.argmax(-1)).float().mean()) > 0.95  # near-ties in float16
