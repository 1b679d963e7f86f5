"""`quantize pack` into folders: every layout of every family is read back bit for bit, and the engine computes the same model."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CONFIGS, LAYERS, write_model
from torch import Tensor

from convert.awq.writer import AwqWriter
from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights
from convert.config import QuantFormat
from convert.errors import InputError
from convert.folder.output import OutputFolder, read_manifest
from convert.formats import FolderFormat
from convert.inspect import inspect_path
from convert.pack.folder import pack_folder
from convert.pack.plan import is_symmetric_model
from convert.readers import open_checkpoint
from convert.verify import verify_path
from engine.model.attention import causal_attend
from engine.model.forward import Model
from kernels.int4 import Quantized, quantize

GROUP = 32
INT4: tuple[FolderFormat, ...] = ("awq", "compressed-tensors", "gptq", "mlx")


def write_awq(
    folder: Path, family: str, *, symmetric: bool = False, keep: tuple[str, ...] = (), **changes: Any
) -> Path:
    """A tiny AWQ checkpoint, rounded to nearest; `symmetric` puts every zero point at 8; roles of `keep` stay float."""
    write_model(folder.with_name(folder.name + "-float"), family, **changes)
    ckpt = open_checkpoint(folder.with_name(folder.name + "-float"))
    with OutputFolder.begin(folder, {}) as out:
        writer = AwqWriter(out, ckpt, QuantFormat(4, GROUP, keep))
        for index in range(ckpt.config.num_layers):
            block = ckpt.block(index)
            linears = {}
            for role, linear in block.linears.items():
                assert isinstance(linear.weight, Tensor)
                weight: Tensor | Quantized = linear.weight
                if role != "router" and role not in keep:
                    made = quantize(linear.weight, 4, GROUP)
                    eights = torch.full_like(made.zeros, 8)
                    weight = Quantized(made.codes, made.scales, eights, GROUP) if symmetric else made
                linears[role] = LinearWeights(weight, linear.bias)
            writer.write_block(index, BlockWeights(index, linears, block.norms))
        writer.finish_files()
        out.finish({"kind": "awq", "bits": 4})
    return folder


def logits(ckpt: Checkpoint) -> Tensor:
    """(L, V) float32 of our own forward pass."""
    ids = torch.randint(0, 128, (24,), generator=torch.Generator().manual_seed(0))
    model = Model.from_checkpoint(ckpt, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return torch.as_tensor(model(ids, torch.arange(len(ids)), causal_attend(1, len(ids), model.config)))


def assert_same_model(found: Checkpoint, wanted: Checkpoint) -> None:
    """Codes, scales, zero points, floats and biases, all equal."""
    for index in range(wanted.config.num_layers):
        ours, theirs = found.block(index), wanted.block(index)
        assert ours.linears.keys() == theirs.linears.keys()
        for role, linear in theirs.linears.items():
            weight, other = linear.weight, ours.linears[role].weight
            assert isinstance(weight, Quantized) == isinstance(other, Quantized)
            if isinstance(weight, Quantized) and isinstance(other, Quantized):
                assert torch.equal(other.codes, weight.codes) and torch.equal(other.zeros, weight.zeros)
                assert torch.equal(other.scales, weight.scales)
            elif isinstance(weight, Tensor) and isinstance(other, Tensor):
                assert torch.equal(other, weight)
            bias, other_bias = linear.bias, ours.linears[role].bias
            assert (bias is None) == (other_bias is None)
            if bias is not None and other_bias is not None:
                assert torch.equal(bias, other_bias)
        assert all(torch.equal(ours.norms[role], norm) for role, norm in theirs.norms.items())
    assert torch.equal(found.embedding(), wanted.embedding())
    assert torch.equal(found.lm_head(), wanted.lm_head())
    assert torch.equal(found.final_norm(), wanted.final_norm())


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("target", INT4)
def test_every_family_comes_back_bit_for_bit(
    target: FolderFormat, family: str, symmetric: bool, tmp_path: Path
) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", family, symmetric=symmetric))
    pack_folder(source, tmp_path / "out", target)
    found = open_checkpoint(tmp_path / "out")
    assert found.kind == target
    assert_same_model(found, source)
    pack_folder(found, tmp_path / "back", "awq")
    for path in sorted((tmp_path / "awq").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()
    ours, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("awq", "back"))
    assert ours == back


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral"])
@pytest.mark.parametrize("target", INT4[1:])
def test_the_engine_computes_the_same_logits(target: FolderFormat, family: str, tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", family))
    pack_folder(source, tmp_path / "out", target)
    assert torch.equal(logits(open_checkpoint(tmp_path / "out")), logits(source))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral", "internlm2"])
def test_float16_is_the_dequantized_model_rounded_once(family: str, tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", family))
    pack_folder(source, tmp_path / "out", "float16")
    found = open_checkpoint(tmp_path / "out")
    assert found.kind == "hf" and found.config.dtype == "float16"
    for index in range(LAYERS):
        ours, theirs = found.block(index).linears, source.block(index).linears
        for role, linear in theirs.items():
            weight = linear.weight
            wanted = weight.dequantize(torch.float16) if isinstance(weight, Quantized) else weight
            assert torch.equal(torch.as_tensor(ours[role].weight), wanted)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("target", INT4)
def test_verify_and_inspect_take_it(target: FolderFormat, tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", "llama"))
    result = pack_folder(source, tmp_path / "out", target)
    assert result.files == LAYERS + 1
    report = verify_path(tmp_path / "out", tmp_path / "awq-float")
    assert report.passed, report.checks
    assert inspect_path(tmp_path / "out").quantization == "int4, groups of 32"
    facts = read_manifest(tmp_path / "out").data
    assert facts["kind"] == target and facts["bits"] == 4 and facts["group_size"] == GROUP


def test_a_flipped_code_is_found_by_verify(tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", "llama"))
    pack_folder(source, tmp_path / "out", "compressed-tensors")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    assert not verify_path(tmp_path / "out").passed


def test_symmetric_is_found_in_the_zero_points(tmp_path: Path) -> None:
    assert is_symmetric_model(open_checkpoint(write_awq(tmp_path / "s", "llama", symmetric=True)))
    assert not is_symmetric_model(open_checkpoint(write_awq(tmp_path / "a", "llama")))


def quantization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def test_what_symmetric_changes_in_the_config(tmp_path: Path) -> None:
    for name, symmetric in (("s", True), ("a", False)):
        source = open_checkpoint(write_awq(tmp_path / name, "llama", symmetric=symmetric))
        pack_folder(source, tmp_path / f"{name}-ct", "compressed-tensors")
        pack_folder(source, tmp_path / f"{name}-gptq", "gptq")
        weights = quantization(tmp_path / f"{name}-ct")["config_groups"]["group_0"]["weights"]
        assert weights["symmetric"] is symmetric
        quant = quantization(tmp_path / f"{name}-gptq")
        assert quant["sym"] is symmetric
        assert quant["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")


@pytest.mark.parametrize("keep", [("down",), ("q", "k", "v"), ("gate", "up")])
@pytest.mark.parametrize("target", INT4)
def test_float_linears_stay_float_and_are_named(
    target: FolderFormat, keep: tuple[str, ...], tmp_path: Path
) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", "llama", keep=keep))
    pack_folder(source, tmp_path / "out", target)
    assert_same_model(open_checkpoint(tmp_path / "out"), source)
    fused = {("q", "k", "v"): "self_attn.qkv_proj", ("gate", "up"): "mlp.gate_up_proj"}.get(keep)
    wanted = {f"{'self_attn' if role in 'qkvo' else 'mlp'}.{role}_proj" for role in keep}
    wanted |= {fused} if fused else set()
    quant = quantization(tmp_path / "out")
    if target == "gptq":
        assert set(quant["dynamic"]) == {f"-:.*{name.replace('.', chr(92) + '.')}$" for name in wanted}
    elif target != "mlx":
        names = quant["ignore" if target == "compressed-tensors" else "modules_to_not_convert"]
        assert set(names) == wanted | {"lm_head"}


def test_a_router_is_named_in_full(tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", "mixtral"))
    pack_folder(source, tmp_path / "out", "compressed-tensors")
    assert quantization(tmp_path / "out")["ignore"] == [
        "lm_head",
        *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(LAYERS)),
    ]


@pytest.mark.parametrize("target", INT4[1:])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(target: FolderFormat, tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", "llama"))
    pack_folder(source, tmp_path / "whole", target)
    if pid := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    else:

        def die(done: int, total: int) -> None:
            os._exit(9)

        pack_folder(source, tmp_path / "out", target, progress=die)
    first = tmp_path / "out" / "model-00001-of-00003.safetensors"
    before = first.stat().st_mtime_ns
    with pytest.raises(InputError, match="unfinished"):
        open_checkpoint(tmp_path / "out")
    pack_folder(source, tmp_path / "out", target)
    assert first.stat().st_mtime_ns == before  # what was done was not done again
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file() and path.name != "report.json":
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_another_format_is_no_resumption(tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", "llama"))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_folder(source, tmp_path / "out", "mlx", progress=stop)
    with pytest.raises(InputError, match='format was "mlx", is "gptq"'):
        pack_folder(source, tmp_path / "out", "gptq")


@pytest.mark.parametrize("target", INT4)
def test_float_and_narrow_sources_are_refused(target: FolderFormat, tmp_path: Path) -> None:
    write_awq(tmp_path / "awq", "llama")
    with pytest.raises(InputError, match="float checkpoint"):
        pack_folder(open_checkpoint(tmp_path / "awq-float"), tmp_path / "out", target)
    ckpt = open_checkpoint(tmp_path / "awq-float")
    with OutputFolder.begin(tmp_path / "int3", {}) as out:
        writer = AwqWriter(out, ckpt, QuantFormat(3, GROUP))
        for index in range(LAYERS):
            block = ckpt.block(index)
            linears = {
                r: LinearWeights(quantize(torch.as_tensor(w.weight), 3, GROUP))
                for r, w in block.linears.items()
            }
            writer.write_block(index, BlockWeights(index, linears, block.norms))
        writer.finish_files()
        out.finish({"kind": "awq", "bits": 3})
    with pytest.raises(InputError, match="3-bit"):
        pack_folder(open_checkpoint(tmp_path / "int3"), tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


ROPE = {
    "none": ({}, None),
    "old": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"type": "linear", "factor": 2.0},
    ),
    "new": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}},
        {"rope_type": "yarn", "factor": 4.0},
    ),
}


@pytest.mark.parametrize("kind", ROPE)
def test_rope_and_dtype_stand_in_both_spellings(kind: str, tmp_path: Path) -> None:
    keys, scaling = ROPE[kind]
    folder = write_awq(tmp_path / "awq", "llama", **keys)
    config = json.loads((folder / "config.json").read_text())
    theta = 5e5 if keys else 10000.0
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == theta
    assert config["rope_scaling"] == scaling
    rest = {k: v for k, v in (scaling or {}).items() if k != "type"} | {"rope_theta": theta}
    assert config["rope_parameters"] == {"rope_type": (scaling or {}).get("type", "default")} | rest
    read = open_checkpoint(folder).config
    assert (
        read.rope_theta == theta
        and read.rope_scaling == open_checkpoint(tmp_path / "awq-float").config.rope_scaling
    )


@pytest.mark.parametrize("kind", ROPE)
def test_transformers_finds_the_same_rope(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = write_awq(tmp_path / "awq", "llama", **ROPE[kind][0])
    ours, theirs = (
        AutoConfig.from_pretrained(path).rope_parameters for path in (folder, tmp_path / "awq-float")
    )
    assert {k: v for k, v in ours.items() if k != "type"} == {k: v for k, v in theirs.items() if k != "type"}


def test_shards_hold_no_float_matrix_of_a_packed_linear(tmp_path: Path) -> None:
    source = open_checkpoint(write_awq(tmp_path / "awq", "qwen2"))
    pack_folder(source, tmp_path / "out", "compressed-tensors")
    tensors: dict[str, Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(path)
    packed = {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}
    assert len(packed) == 7 * LAYERS and not any(f"{name}.weight" in tensors for name in packed)
