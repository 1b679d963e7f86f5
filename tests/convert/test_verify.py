"""`verify_path` and `inspect_path`: sound checkpoints pass, and each kind of damage fails the check that is meant for it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_tensors, write_model

from convert.awq.writer import AwqWriter
from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights
from convert.config import QuantFormat
from convert.errors import InputError
from convert.folder.output import OutputFolder
from convert.inspect import count_parameters, inspect_path
from convert.likeness import relative_rest
from convert.pad import pad_checkpoint
from convert.readers import open_checkpoint
from convert.verify import _check_ranges, verify_path
from kernels.int4 import quantize


def folded(block: BlockWeights, bits: int) -> BlockWeights:
    """Scales moved as AWQ does (norm -> q, k, v; up -> down), then rounded."""
    generator = torch.Generator().manual_seed(block.index)
    into = torch.rand(64, generator=generator) + 0.5
    inner = torch.rand(96, generator=generator) + 0.5
    linears = {}
    for role, linear in block.linears.items():
        weight = linear.weight.float()
        weight = weight * into if role in ("q", "k", "v") else weight
        weight = weight / inner[:, None] if role == "up" else weight * inner if role == "down" else weight
        linears[role] = LinearWeights(quantize(weight, bits, 32), linear.bias)
    norms = block.norms | {"attn_norm": block.norms["attn_norm"] / into}
    return BlockWeights(block.index, linears, norms)


def write_awq(ckpt: Checkpoint, out: Path, bits: int = 4, swap: bool = False) -> None:
    with OutputFolder.begin(out, {}) as folder:
        writer = AwqWriter(folder, ckpt, QuantFormat(bits, 32))
        for i in range(ckpt.config.num_layers):
            block = folded(ckpt.block(i), bits)
            if swap:  # gate and up exchanged: the same shapes, finite, in range, and wrong
                linears = block.linears
                linears["gate"], linears["up"] = linears["up"], linears["gate"]
            writer.write_block(i, block)
        writer.finish_files()
        folder.finish({"kind": "awq", "bits": bits})


@pytest.fixture
def source(tmp_path) -> Path:
    write_model(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_sound_checkpoint_passes(bits: int, source: Path, tmp_path) -> None:
    write_awq(open_checkpoint(source), tmp_path / "q", bits)
    seen = []
    report = verify_path(tmp_path / "q", source, progress=lambda done, total: seen.append((done, total)))
    assert report.passed, report
    assert {check.name for check in report.checks} == {"digests", "open", "ranges", "weights", "embedding"}
    assert len(report.rests) == 2 * 7 and seen == [(1, 2), (2, 2)]
    assert all(0.001 < rest < {4: 0.15, 3: 0.3, 2: 0.65}[bits] for rest in report.rests.values())
    json.dumps(report.to_json())


def test_a_padded_checkpoint_is_compared_with_the_padded_source(source: Path, tmp_path) -> None:
    padded = pad_checkpoint(open_checkpoint(source), 128)
    with OutputFolder.begin(tmp_path / "q", {}) as folder:
        writer = AwqWriter(folder, padded, QuantFormat(4, 128))
        for i in range(2):
            block = padded.block(i)
            linears = {r: LinearWeights(quantize(w.weight, 4, 128), w.bias) for r, w in block.linears.items()}
            writer.write_block(i, BlockWeights(i, linears, block.norms))
        writer.finish_files()
        folder.finish({"kind": "awq", "bits": 4})
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert (config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (
        128,
        8,
        4,
    )
    assert verify_path(tmp_path / "q", source).passed


def failed(path: Path, source: Path | None = None) -> set[str]:
    return {check.name for check in verify_path(path, source).checks if not check.passed}


def test_weights_of_other_roles_are_found_out(source: Path, tmp_path) -> None:
    write_awq(open_checkpoint(source), tmp_path / "q", swap=True)
    assert failed(tmp_path / "q") == set()
    assert failed(tmp_path / "q", source) == {"weights"}


def test_another_source_is_found_out(source: Path, tmp_path) -> None:
    write_awq(open_checkpoint(source), tmp_path / "q")
    other = {name: torch.flip(tensor, [0]) for name, tensor in random_tensors("llama").items()}
    write_model(tmp_path / "other", tensors=other)
    assert failed(tmp_path / "q", tmp_path / "other") == {"weights", "embedding"}
    write_model(tmp_path / "qwen", "qwen")
    with pytest.raises(InputError, match="is not the source"):
        verify_path(tmp_path / "q", tmp_path / "qwen")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_damaged_source_is_not_blamed_on_the_output(name: str, source: Path, tmp_path) -> None:
    write_awq(open_checkpoint(source), tmp_path / "q")
    tensors = random_tensors("llama")
    tensors[name].view(-1)[5] = float("nan")
    write_model(tmp_path / "torn", tensors=tensors)
    checks = {check.name: check for check in verify_path(tmp_path / "q", tmp_path / "torn").checks}
    assert checks["ranges"].passed and {n for n, check in checks.items() if not check.passed} == {"source"}
    assert f"its source {tmp_path / 'torn'} is damaged" in checks["source"].detail
    assert name in checks["source"].detail and "1 NaN" in checks["source"].detail


def shard_with(folder: Path, part: str) -> Path:
    return next(p for p in sorted(folder.glob("*.safetensors")) if any(part in name for name in load_file(p)))


def test_a_flipped_bit_fails_the_digest(source: Path, tmp_path) -> None:
    write_awq(open_checkpoint(source), tmp_path / "q")
    path = shard_with(tmp_path / "q", "qweight")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "digests" in failed(tmp_path / "q")


def test_another_head_is_found_out(source: Path, tmp_path) -> None:
    """The head alone is another one: the embedding and every block are the source's."""
    write_awq(open_checkpoint(source), tmp_path / "q")
    tensors = random_tensors("llama")
    tensors["lm_head.weight"] = torch.flip(tensors["lm_head.weight"], [0])
    write_model(tmp_path / "other", tensors=tensors)
    assert failed(tmp_path / "q", tmp_path / "other") == {"embedding"}


@pytest.mark.parametrize("part", ["codes", "zeros"])
def test_codes_and_zeros_above_the_width_are_out_of_range(part: str) -> None:
    """Words hold 4 bits even where the checkpoint says 3: both parts must keep to the width."""
    weight = quantize(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), 3, 32)
    _check_ranges(BlockWeights(0, {"q": LinearWeights(weight, None)}, {}))
    getattr(weight, part)[0, 0] = 8
    with pytest.raises(InputError, match=r"block 0, q: codes or zeros lie above 7"):
        _check_ranges(BlockWeights(0, {"q": LinearWeights(weight, None)}, {}))


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0])
def test_scales_out_of_range_of_a_foreign_checkpoint(value: float, source: Path, tmp_path) -> None:
    write_awq(open_checkpoint(source), tmp_path / "q")
    path = shard_with(tmp_path / "q", "scales")
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("scales"))
    tensors[name][0, 0] = value
    save_file(tensors, path)
    for leftover in sorted((tmp_path / "q" / "tmq").iterdir()):
        leftover.unlink()
    (tmp_path / "q" / "tmq").rmdir()
    report = verify_path(tmp_path / "q")
    assert {c.name for c in report.checks if not c.passed} == {"ranges"} and "no manifest" in report.notes[0]


def test_unfinished_and_unreadable(source: Path, tmp_path) -> None:
    with OutputFolder.begin(tmp_path / "q", {}):
        pass
    assert failed(tmp_path / "q") == {"digests", "open"}
    with pytest.raises(InputError):
        verify_path(tmp_path / "nothing")


def test_relative_rest_by_hand() -> None:
    source = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    rows, cols = torch.rand(40, 1) + 0.5, torch.rand(1, 60) + 0.5
    assert relative_rest(source * rows * cols, source) < 1e-3
    assert relative_rest(source[torch.randperm(40)], source) > 0.9
    assert (
        relative_rest(torch.zeros(4, 4), torch.zeros(4, 4)) == 0.0
        and relative_rest(torch.ones(4, 4), torch.zeros(4, 4)) == 1.0
    )


def test_inspect(source: Path, tmp_path) -> None:
    report = inspect_path(source)
    tensors = random_tensors("llama")
    assert report.family == "llama" and report.problem is None and len(report.tensors) == len(tensors)
    assert report.parameters == sum(t.numel() for t in tensors.values())
    write_awq(open_checkpoint(source), tmp_path / "q", 3)
    report = inspect_path(tmp_path / "q")
    assert (
        report.kind == "awq" and report.quantization.startswith("int3") and "save nothing" in report.notes[-1]
    )
    assert report.parameters == count_parameters(open_checkpoint(source).config)
    json.dumps(report.to_json())


def test_inspect_lists_what_cannot_be_opened(source: Path) -> None:
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "gptq"}}))
    report = inspect_path(source)
    assert report.quantization == "gptq" and report.problem is not None and len(report.tensors) > 10
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError):
        inspect_path(source)


def test_inspect_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(InputError, match=r"nothing does not exist: expected a checkpoint"):
        inspect_path(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"notes.txt is neither a model folder nor a .gguf file: expected"):
        inspect_path(tmp_path / "notes.txt")
