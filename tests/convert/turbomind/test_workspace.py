"""Workspaces written and read back bit for bit: families, ranks, dtypes; and what a damaged one says."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights
from convert.config import ModelConfig, QuantFormat, RopeScaling
from convert.errors import InputError
from convert.families.table import BY_NAME, bias_roles, linear_shapes, norm_shapes
from convert.folder.files import write_json
from convert.hf.made_config import made_config
from convert.readers import open_checkpoint
from convert.turbomind.reader import WorkspaceCheckpoint
from convert.turbomind.unpack import unpack_workspace
from convert.turbomind.writer import PACKED_FAMILIES, write_workspace
from kernels.int4 import Quantized


@dataclass
class MemoryCheckpoint(Checkpoint):
    """Random weights of a configuration, the same at every call."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.dtype == "bfloat16" else torch.float16

    def _random(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def block(self, index: int) -> BlockWeights:
        generator = self._random(index)
        biased = bias_roles(self.config)
        linears = {}
        for role, (rows, cols) in linear_shapes(self.config).items():
            bias = torch.randn(rows, generator=generator).to(self.dtype) if role in biased else None
            weight: Tensor | Quantized = torch.randn(rows, cols, generator=generator).to(self.dtype)
            if self.config.quantization and role != "router":
                groups = cols // 128
                codes = torch.randint(0, 16, (rows, cols), generator=generator, dtype=torch.uint8)
                zeros = torch.randint(0, 16, (rows, groups), generator=generator, dtype=torch.uint8)
                weight = Quantized(codes, torch.rand(rows, groups, generator=generator).half(), zeros, 128)
            linears[role] = LinearWeights(weight, bias)
        norms = {
            role: torch.randn(*shape, generator=generator).to(self.dtype)
            for role, shape in norm_shapes(self.config).items()
        }
        return BlockWeights(index, linears, norms)

    def embedding(self) -> Tensor:
        return torch.randn(self.config.vocab_size, self.config.hidden_size, generator=self._random(100)).to(
            self.dtype
        )

    def final_norm(self) -> Tensor:
        return torch.randn(self.config.hidden_size, generator=self._random(101)).to(self.dtype)

    def lm_head(self) -> Tensor:
        return torch.randn(self.config.vocab_size, self.config.hidden_size, generator=self._random(102)).to(
            self.dtype
        )

    def weight_files(self) -> list[Path]:
        return []


def tiny(family: str, tmp_path: Path, kind: str, **changes: object) -> MemoryCheckpoint:
    """Eight query heads of 128, four KV heads where the family has GQA: tp 8 copies them; sizes that need padding."""
    row = BY_NAME[family]
    config = ModelConfig(
        family=family,
        architecture=row.architecture,
        hidden_size=512,
        intermediate_size=384,
        num_layers=1,
        num_heads=8,
        num_kv_heads=8 if family == "qwen" else 4,
        head_dim=128,
        vocab_size=131,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_position=256,
        bos_token_id=1,
        eos_token_ids=(2,),
        qkv_bias=family in ("qwen2", "qwen", "internlm"),
        o_bias=family == "internlm",
        num_experts=2 if family == "mixtral" else 0,
        experts_per_token=1 if family == "mixtral" else 0,
        dtype="bfloat16" if kind == "bfloat16" else "float16",
        quantization=QuantFormat(4, 128) if kind == "int4" else None,
    )
    config = replace(config, **changes)  # type: ignore[arg-type]
    source = tmp_path / "source"
    source.mkdir()
    write_json(source / "config.json", made_config(config) | {"dtype": config.dtype})
    return MemoryCheckpoint(source, "awq" if kind == "int4" else "hf", config, source)


def same_block(one: BlockWeights, other: BlockWeights) -> None:
    assert one.norms.keys() == other.norms.keys() and one.linears.keys() == other.linears.keys()
    for role, norm in one.norms.items():
        assert torch.equal(norm, other.norms[role]), role
    for role, linear in one.linears.items():
        found = other.linears[role]
        if isinstance(linear.weight, Quantized):
            assert isinstance(found.weight, Quantized)
            for part in ("codes", "scales", "zeros"):
                assert torch.equal(getattr(linear.weight, part), getattr(found.weight, part)), (role, part)
        else:
            assert isinstance(found.weight, Tensor) and torch.equal(linear.weight, found.weight), role
        if linear.bias is None:
            assert found.bias is None or not found.bias.any()
        else:
            assert found.bias is not None and torch.equal(linear.bias, found.bias), role


def same_model(one: Checkpoint, other: Checkpoint) -> None:
    assert one.config.num_layers == other.config.num_layers
    for index in range(one.config.num_layers):
        same_block(one.block(index), other.block(index))
    assert torch.equal(one.embedding(), other.embedding()) and torch.equal(one.lm_head(), other.lm_head())
    assert torch.equal(one.final_norm(), other.final_norm())


KINDS = ("float16", "bfloat16", "int4")


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", PACKED_FAMILIES["0.6.5"])
def test_written_and_read_back_bit_for_bit(family: str, kind: str, tp: int, tmp_path: Path) -> None:
    source = tiny(family, tmp_path, kind)
    write_workspace(source, tmp_path / "ws", tp=tp)
    back = open_checkpoint(tmp_path / "ws")
    assert back.kind == "workspace-0.6.5" and back.config.family == family
    same_model(source, back)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", PACKED_FAMILIES["0.1"])
def test_dialect_0_1_written_and_read_back_bit_for_bit(
    family: str, kind: str, tp: int, tmp_path: Path
) -> None:
    source = tiny(family, tmp_path, kind, intermediate_size=512, hidden_size=1024)
    write_workspace(source, tmp_path / "ws", tp=tp, dialect="0.1")
    back = open_checkpoint(tmp_path / "ws")
    assert back.kind == "workspace-0.1" and back.config.family == family
    same_model(source, back)


def as_lmdeploy_leaves_it(workspace: Path, *, config_json: bool = True) -> None:
    """Without what is ours alone, and, as an older tokenizer folder may be, without config.json."""
    for name in ("run.json", "manifest.json", "report.json", "config.json"):
        (workspace / name).unlink(missing_ok=True)
    if not config_json:
        (workspace / "triton_models/tokenizer/config.json").unlink()


@pytest.mark.parametrize("config_json", [True, False], ids=["config", "no-config"])
@pytest.mark.parametrize("dialect", ["0.6.5", "0.1"])
@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_a_workspace_of_lmdeploy_is_read(kind: str, dialect: str, config_json: bool, tmp_path: Path) -> None:
    source = tiny("internlm", tmp_path, kind, intermediate_size=512, hidden_size=1024)
    write_workspace(source, tmp_path / "ws", tp=2, dialect=dialect)  # type: ignore[arg-type]
    as_lmdeploy_leaves_it(tmp_path / "ws", config_json=config_json)
    back = open_checkpoint(tmp_path / "ws")
    assert any("no manifest" in note for note in back.notes)
    assert config_json or any("no config.json" in note for note in back.notes)
    same_model(source, back)


def test_biases_that_lmdeploy_lost_are_noted(tmp_path: Path) -> None:
    source = tiny("internlm", tmp_path, "float16", qkv_bias=False, o_bias=False)
    write_workspace(source, tmp_path / "ws")
    as_lmdeploy_leaves_it(tmp_path / "ws")
    stated = made_config(replace(source.config, qkv_bias=True, o_bias=True))
    write_json(tmp_path / "ws/triton_models/tokenizer/config.json", stated)
    back = open_checkpoint(tmp_path / "ws")
    assert any("biases" in note for note in back.notes)
    same_model(source, back)


def test_zeros_beyond_the_intermediate_size_are_cut_off(tmp_path: Path) -> None:
    """LMDeploy fills Qwen-1 up to twice its intermediate size."""
    wide = tiny("qwen", tmp_path, "float16", intermediate_size=768)
    (tmp_path / "two").mkdir()
    narrow = tiny("qwen", tmp_path / "two", "float16")
    block = narrow.block(0)
    for role in ("gate", "up"):
        weight = block.linears[role].weight
        assert isinstance(weight, Tensor)
        block.linears[role] = LinearWeights(torch.cat([weight, torch.zeros_like(weight)]))
    down = block.linears["down"].weight
    assert isinstance(down, Tensor)
    block.linears["down"] = LinearWeights(torch.cat([down, torch.zeros_like(down)], dim=1))
    wide.block = lambda index: block  # type: ignore[method-assign]
    write_workspace(wide, tmp_path / "ws", tp=2)
    as_lmdeploy_leaves_it(tmp_path / "ws")
    write_json(tmp_path / "ws/triton_models/tokenizer/config.json", made_config(narrow.config))
    same_block(narrow.block(0), open_checkpoint(tmp_path / "ws").block(0))


@pytest.mark.parametrize("config_json", [True, False], ids=["config", "no-config"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", PACKED_FAMILIES["0.6.5"])
def test_unpacked_into_a_checkpoint(family: str, kind: str, config_json: bool, tmp_path: Path) -> None:
    source = tiny(family, tmp_path, kind)
    write_workspace(source, tmp_path / "ws", tp=1)
    if not config_json:
        as_lmdeploy_leaves_it(tmp_path / "ws", config_json=False)
    workspace = open_checkpoint(tmp_path / "ws")
    assert isinstance(workspace, WorkspaceCheckpoint)
    unpack_workspace(workspace, tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    assert back.kind == ("awq" if kind == "int4" else "hf") and back.config.dtype == source.config.dtype
    same_model(source, back)


@pytest.mark.parametrize("kind", ["float16", "int4"])
def test_unpacked_from_dialect_0_1_and_packed_again(kind: str, tmp_path: Path) -> None:
    """Dialect 0.1 -> checkpoint -> dialect 0.6.5 gives the bytes of the direct way."""
    source = tiny("llama", tmp_path, kind, intermediate_size=512, hidden_size=1024)
    write_workspace(source, tmp_path / "old", tp=2, dialect="0.1")
    workspace = open_checkpoint(tmp_path / "old")
    assert isinstance(workspace, WorkspaceCheckpoint)
    unpack_workspace(workspace, tmp_path / "back")
    write_workspace(open_checkpoint(tmp_path / "back"), tmp_path / "new", tp=4)
    write_workspace(source, tmp_path / "direct", tp=4)
    weights = "triton_models/weights"
    names = sorted(path.name for path in (tmp_path / "direct" / weights).iterdir())
    assert names == sorted(path.name for path in (tmp_path / "new" / weights).iterdir())
    for name in names:
        assert (tmp_path / "new" / weights / name).read_bytes() == (
            tmp_path / "direct" / weights / name
        ).read_bytes(), name


ROPE = {
    "linear": RopeScaling("linear", 2.0, 256),
    "dynamic": RopeScaling("dynamic", 2.0, 256),
    "llama3": RopeScaling("llama3", 8.0, 64, 1.0, 4.0),
    "yarn": RopeScaling("yarn", 4.0, 64),
}


@pytest.mark.parametrize("name", ROPE)
def test_rope_scaling_goes_through_config_yaml(name: str, tmp_path: Path) -> None:
    source = tiny("qwen2" if name == "yarn" else "llama", tmp_path, "float16", rope_scaling=ROPE[name])
    write_workspace(source, tmp_path / "ws")
    as_lmdeploy_leaves_it(tmp_path / "ws", config_json=False)
    back = open_checkpoint(tmp_path / "ws").config
    assert back.rope_scaling == replace(ROPE[name], high_freq_factor=ROPE[name].high_freq_factor)
    assert back.max_position == 256
    document = yaml.safe_load((tmp_path / "ws/triton_models/weights/config.yaml").read_text())
    attention = document["attention_config"]
    assert attention["max_position_embeddings"] == (
        64 if name == "yarn" else 256
    )  # yarn counts from training
    assert attention["attention_factor"] == -1.0 and document["model_config"]["session_len"] == 256


def test_dialect_0_1_refuses_what_it_cannot_say(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path, "float16", rope_scaling=ROPE["llama3"], hidden_size=1024)
    with pytest.raises(InputError, match=r"dialect 0\.1 has no llama3 RoPE scaling"):
        write_workspace(source, tmp_path / "ws", dialect="0.1")


def test_dtype_and_chat_template_are_chosen(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path, "float16")
    write_workspace(source, tmp_path / "ws", dtype="bfloat16", chat_template="llama3_1")
    document = yaml.safe_load((tmp_path / "ws/triton_models/weights/config.yaml").read_text())["model_config"]
    assert (document["weight_type"], document["chat_template"]) == ("bfloat16", "llama3_1")
    with pytest.raises(InputError, match="no chat template named lama3"):
        write_workspace(source, tmp_path / "other", chat_template="lama3")


def test_head_and_router_left_in_float_are_no_hindrance(tmp_path: Path) -> None:
    names = ("lm_head", "block_sparse_moe.gate")
    source = tiny("mixtral", tmp_path, "int4", quantization=QuantFormat(4, 128, names))
    write_workspace(source, tmp_path / "ws")
    same_model(source, open_checkpoint(tmp_path / "ws"))


def test_linears_left_in_float_are_named(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path, "int4", quantization=QuantFormat(4, 128, ("lm_head", "mlp.down_proj")))
    with pytest.raises(InputError, match=r"leaves linears in float \(mlp.down_proj\)"):
        write_workspace(source, tmp_path / "ws")


def test_static_kv_files_cover_the_heads_of_a_rank(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path, "int4", intermediate_size=512, hidden_size=1024)
    (source.path / "tmq").mkdir()
    scale, zero = torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 100.0])
    parts = {
        f"layers.0.{which}.{part}": value.clone()
        for which in "kv"
        for part, value in (("scale", scale), ("zero", zero))
    }
    save_file(parts, source.path / "tmq/kv_params.safetensors")
    write_workspace(source, tmp_path / "ws", tp=2, dialect="0.1")
    weights = tmp_path / "ws/triton_models/weights"
    # rank 0: heads 0 and 1, ranges [-128, 127] and [-256, 254]; rank 1: [-128, 127] and [-28, 227]
    first = torch.frombuffer(
        bytearray((weights / "layers.0.past_kv_scale.0.weight").read_bytes()), dtype=torch.float32
    )
    assert first.tolist() == [2.0, -1.0, 2.0, -1.0]
    second = torch.frombuffer(
        bytearray((weights / "layers.0.past_kv_scale.1.weight").read_bytes()), dtype=torch.float32
    )
    assert torch.allclose(second, torch.tensor([355 / 255, 49.5, 355 / 255, 49.5]))
    assert "quant_policy = 4" in (weights / "config.ini").read_text()


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    write_workspace(tiny("llama", tmp_path, "int4", num_layers=2), tmp_path / "ws")
    victim = tmp_path / "ws/triton_models/weights/layers.1.attention.wo.0.qweight"
    victim.write_bytes(victim.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"layers\.1\.attention\.wo\.0\.qweight has"):
        open_checkpoint(tmp_path / "ws")


@pytest.mark.parametrize("damage", ["rewritten", "cut", "removed"])
def test_a_workspace_that_changes_while_it_is_read_is_refused(damage: str, tmp_path: Path) -> None:
    write_workspace(tiny("llama", tmp_path, "int4", num_layers=2), tmp_path / "w")
    opened = open_checkpoint(tmp_path / "w")
    assert isinstance(opened, WorkspaceCheckpoint)
    path = opened.weights / "layers.1.attention.wo.0.qweight"
    before = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(bytes(len(before)) if damage == "rewritten" else before[:-4])
        os.utime(path, ns=(1, 1))  # the clock of a file system may not tell two writes apart
    opened.block(0)
    with pytest.raises(InputError, match=path.name):
        opened.block(1)
    with pytest.raises(InputError, match=path.name):
        opened.check_unchanged()


def test_the_legal_ranks_are_named(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path, "int4", num_heads=4, num_kv_heads=2)
    with pytest.raises(InputError, match=r"tp may be 1, 2, 4\."):
        write_workspace(source, tmp_path / "ws", tp=8)


def test_no_index_of_shards_lies_in_a_workspace(tmp_path: Path) -> None:
    """LMDeploy 0.18 takes a folder with one for a checkpoint, and stops at the shards that it names and that are not there."""
    tiny_models.write_model(tmp_path / "m", "llama", shards=2)
    assert (tmp_path / "m/model.safetensors.index.json").is_file()
    write_workspace(open_checkpoint(tmp_path / "m"), tmp_path / "ws")
    assert not list((tmp_path / "ws").rglob("*.index.json"))
