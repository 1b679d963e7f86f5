"""What the demo left behind: an ordered perplexity table, a workspace that says what the checkpoint says, bounded memory."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convert.readers import open_checkpoint
from kernels.int4 import Quantized

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def record(demo_out: Path) -> dict[str, list[dict[str, float]]]:
    document: dict[str, list[dict[str, float]]] = json.loads(
        (demo_out / "demo.json").read_text(encoding="utf8")
    )
    return document


def test_methods_are_in_order(record: dict[str, list[dict[str, float]]]) -> None:
    fp, rtn, fast, default, workspace = (row["ppl"] for row in record["perplexity"][:5])
    assert fp < default < fast < rtn
    # the same weights through another format: only the order of float operations may differ
    assert workspace == pytest.approx(default, rel=1e-4)


def test_int8_kv_costs_little(record: dict[str, list[dict[str, float]]]) -> None:
    workspace, kv8 = record["perplexity"][4]["ppl"], record["perplexity"][5]["ppl"]
    assert kv8 == pytest.approx(workspace, rel=5e-3)


def test_memory_stays_under_4_gb(record: dict[str, list[dict[str, float]]]) -> None:
    assert max(step["peak_rss_gib"] for step in record["rows"]) < 4.0


def test_workspace_holds_the_bits_of_the_checkpoint(demo_out: Path) -> None:
    checkpoint, workspace = open_checkpoint(demo_out / "default"), open_checkpoint(demo_out / "workspace")
    for index in (0, checkpoint.config.num_layers - 1):
        ours, theirs = checkpoint.block(index), workspace.block(index)
        for role, linear in ours.linears.items():
            one, other = linear.weight, theirs.linears[role].weight
            assert isinstance(one, Quantized) and isinstance(other, Quantized)
            assert torch.equal(one.dequantize(), other.dequantize()), (index, role)
        for role, norm in ours.norms.items():
            assert isinstance(norm, Tensor) and torch.equal(norm, theirs.norms[role]), (index, role)
    assert torch.equal(checkpoint.embedding(), workspace.embedding())
