"""Workspaces written and read back bit for bit: families, ranks, dtypes; and what a damaged one says."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights, open_checkpoint
from convert.config import ModelConfig, QuantFormat
from convert.errors import InputError
from convert.families import BY_NAME, bias_roles, linear_shapes, norm_shapes
from convert.workspace_write import write_workspace
from kernels.int4 import Quantized


@dataclass
class MemoryCheckpoint(Checkpoint):
    """Random weights of a configuration, the same at every call."""

    def _random(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def block(self, index: int) -> BlockWeights:
        generator = self._random(index)
        biased = bias_roles(self.config)
        linears = {}
        for role, (rows, cols) in linear_shapes(self.config).items():
            bias = torch.randn(rows, generator=generator).half() if role in biased else None
            weight: Tensor | Quantized = torch.randn(rows, cols, generator=generator).half()
            if self.config.quantization and role != "router":
                groups = cols // 128
                codes = torch.randint(0, 16, (rows, cols), generator=generator, dtype=torch.uint8)
                zeros = torch.randint(0, 16, (rows, groups), generator=generator, dtype=torch.uint8)
                weight = Quantized(codes, torch.rand(rows, groups, generator=generator).half(), zeros, 128)
            linears[role] = LinearWeights(weight, bias)
        norms = {
            role: torch.randn(*shape, generator=generator).half()
            for role, shape in norm_shapes(self.config).items()
        }
        return BlockWeights(index, linears, norms)

    def embedding(self) -> Tensor:
        return torch.randn(
            self.config.vocab_size, self.config.hidden_size, generator=self._random(100)
        ).half()

    def final_norm(self) -> Tensor:
        return torch.randn(self.config.hidden_size, generator=self._random(101)).half()

    def lm_head(self) -> Tensor:
        return torch.randn(
            self.config.vocab_size, self.config.hidden_size, generator=self._random(102)
        ).half()

    def weight_files(self) -> list[Path]:
        return []


def tiny(family: str, tmp_path: Path, int4: bool, **changes: object) -> MemoryCheckpoint:
    row = BY_NAME[family]
    config = ModelConfig(
        family=family,
        architecture=row.architecture,
        hidden_size=512,
        intermediate_size=384,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        vocab_size=131,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_position=256,
        qkv_bias=family in ("qwen2", "internlm"),
        o_bias=family == "internlm",
        num_experts=2 if family == "mixtral" else 0,
        experts_per_token=1 if family == "mixtral" else 0,
        quantization=QuantFormat(4, 128) if int4 else None,
    )
    source = tmp_path / "source"
    source.mkdir()
    return MemoryCheckpoint(source, "awq" if int4 else "hf", replace(config, **changes), source)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("int4", [False, True], ids=["float", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "internlm", "internlm2", "mixtral"])
def test_written_and_read_back_bit_for_bit(family: str, int4: bool, tp: int, tmp_path: Path) -> None:
    source = tiny(family, tmp_path, int4, intermediate_size=512)
    write_workspace(source, tmp_path / "ws", tp=tp)
    back = open_checkpoint(tmp_path / "ws")
    for index in range(source.config.num_layers):
        same_block(source.block(index), back.block(index))
    assert torch.equal(source.embedding(), back.embedding()) and torch.equal(source.lm_head(), back.lm_head())
    assert torch.equal(source.final_norm(), back.final_norm())


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("int4", [False, True], ids=["float", "int4"])
def test_dialect_0_1_written_and_read_back_bit_for_bit(int4: bool, tp: int, tmp_path: Path) -> None:
    source = tiny("llama", tmp_path, int4, head_dim=128, num_heads=4, intermediate_size=512)
    write_workspace(source, tmp_path / "ws", tp=tp, dialect="0.1")
    back = open_checkpoint(tmp_path / "ws")
    assert back.kind == "workspace-0.1"
    for index in range(source.config.num_layers):
        same_block(source.block(index), back.block(index))
    assert torch.equal(source.embedding(), back.embedding()) and torch.equal(source.lm_head(), back.lm_head())


def test_static_kv_files_cover_the_heads_of_a_rank(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path, True, head_dim=128, num_heads=4, intermediate_size=512, num_layers=1)
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
    write_workspace(tiny("llama", tmp_path, True), tmp_path / "ws")
    victim = tmp_path / "ws/triton_models/weights/layers.1.attention.wo.0.qweight"
    victim.write_bytes(victim.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"layers\.1\.attention\.wo\.0\.qweight has"):
        open_checkpoint(tmp_path / "ws")


def test_the_legal_ranks_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tp may be 1, 2, 4\."):
        write_workspace(tiny("llama", tmp_path, True), tmp_path / "ws", tp=8)
