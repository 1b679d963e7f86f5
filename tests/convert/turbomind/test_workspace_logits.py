"""Checkpoint folders of every family packed for every legal number of ranks in both dialects: the engine's logits stay the same.

Weights are equal bit for bit (`test_workspace` shows it too, without files of a checkpoint), so what is left to differ is what the
configuration of the workspace says: RoPE, norms, biases, sizes.
"""

import os
from pathlib import Path

import pytest
import torch
from tiny_models import random_tensors, write_model
from torch import Tensor

from convert.awq.writer import AwqWriter
from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights
from convert.config import QuantFormat
from convert.folder.output import OutputFolder
from convert.readers import open_checkpoint
from convert.turbomind.packing import TP_VALUES, Dialect, legal_tp
from convert.turbomind.writer import PACKED_FAMILIES, write_workspace
from engine.model.attention import causal_attend
from engine.model.forward import Model
from kernels.int4 import quantize

FORMATS = ("float16", "int4")
DIALECTS: tuple[Dialect, ...] = ("0.6.5", "0.1")
SIZES = {"hidden_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 1, "vocab_size": 131}
INNER = 1024  # eight groups: dialect 0.1 has no padding


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def sizes(family: str, inner: int = INNER) -> dict[str, int]:
    found = SIZES | {"intermediate_size": 2 * inner if family == "qwen" else inner}
    if family == "qwen":
        return found | {"kv_channels": 128}
    return found | {"num_key_value_heads": 8 if family == "internlm" else 4}


def write_checkpoint(folder: Path, family: str, kind: str, inner: int = INNER) -> Checkpoint:
    """A checkpoint in the family's own names, float or AWQ."""
    changes = sizes(family, inner)
    write_model(folder / "float", family, tensors=random_tensors(family, **changes), **changes)
    source = open_checkpoint(folder / "float")
    if kind == "float16":
        return source
    with OutputFolder.begin(folder / "awq", {}) as out:
        writer = AwqWriter(out, source, QuantFormat(4, 128))
        block = source.block(0)
        linears = {}
        for role, linear in block.linears.items():
            assert isinstance(linear.weight, Tensor)
            weight = linear.weight if role == "router" else quantize(linear.weight, 4, 128)
            linears[role] = LinearWeights(weight, linear.bias)
        writer.write_block(0, BlockWeights(0, linears, block.norms))
        writer.finish_files()
        out.finish({"kind": "awq", "bits": 4})
    return open_checkpoint(folder / "awq")


def logits(ckpt: Checkpoint) -> Tensor:
    """(L, V) float32."""
    model = Model.from_checkpoint(ckpt, torch.device("cpu"), torch.float32)
    ids = torch.randint(0, 131, (9,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        hidden = model(ids, torch.arange(len(ids)), causal_attend(1, len(ids), model.config))
    return torch.as_tensor(hidden)


def check_every_tp(source: Checkpoint, dialect: Dialect, kind: str, folder: Path) -> list[int]:
    wanted = logits(source)
    assert bool(torch.isfinite(wanted).all()) and float(wanted.std()) > 1e-3
    legal = legal_tp(source.config, "int4" if kind == "int4" else "float16", dialect)
    for tp in legal:
        write_workspace(source, folder / f"tp{tp}", tp=tp, dialect=dialect)
        back = open_checkpoint(folder / f"tp{tp}")
        assert back.kind == f"workspace-{dialect}"
        # the same numbers in the same order: no rounding differs
        assert torch.equal(logits(back), wanted), (dialect, tp)
    return legal


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", PACKED_FAMILIES["0.6.5"])
def test_logits_of_every_tp(family: str, kind: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, family, kind)
    assert check_every_tp(source, "0.6.5", kind, tmp_path) == list(TP_VALUES)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", PACKED_FAMILIES["0.1"])
def test_logits_of_every_tp_in_dialect_0_1(family: str, kind: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, family, kind)
    copies_heads = source.config.num_kv_heads == 4  # which this dialect does not
    assert check_every_tp(source, "0.1", kind, tmp_path) == [
        tp for tp in TP_VALUES if tp < 8 or not copies_heads
    ]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_logits_where_the_intermediate_size_is_padded(family: str, kind: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, family, kind, inner=384)
    assert check_every_tp(source, "0.6.5", kind, tmp_path) == list(TP_VALUES)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", FORMATS)
def test_logits_of_lmdeploy_s_own_workspace(kind: str, dialect: Dialect, tmp_path: Path) -> None:
    """Without our manifest and without config.json: everything comes from the configuration of the workspace."""
    source = write_checkpoint(tmp_path, "llama", kind)
    wanted = logits(source)
    write_workspace(source, tmp_path / "ws", tp=2, dialect=dialect)
    for name in (
        "run.json",
        "manifest.json",
        "report.json",
        "config.json",
        "triton_models/tokenizer/config.json",
    ):
        (tmp_path / "ws" / name).unlink()
    assert torch.equal(logits(open_checkpoint(tmp_path / "ws")), wanted)
