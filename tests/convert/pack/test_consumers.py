"""Engines of others load tiny models as `quantize pack` writes them, where they are installed; their logits are compared with ours."""

from pathlib import Path

import pytest
import torch
from tiny_models import LAYERS, write_model
from torch import Tensor

from convert.awq.writer import AwqWriter
from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import QuantFormat
from convert.folder.output import OutputFolder
from convert.pack.folder import pack_folder
from convert.readers import open_checkpoint
from engine.model.attention import causal_attend
from engine.model.forward import Model
from kernels.int4 import quantize

IDS = torch.randint(0, 128, (24,), generator=torch.Generator().manual_seed(0))


def write_awq(folder: Path, family: str, symmetric: bool) -> Path:
    """A tiny AWQ checkpoint, rounded to nearest in groups of 32."""
    write_model(folder.with_name(folder.name + "-float"), family)
    ckpt = open_checkpoint(folder.with_name(folder.name + "-float"))
    with OutputFolder.begin(folder, {}) as out:
        writer = AwqWriter(out, ckpt, QuantFormat(4, 32))
        for index in range(LAYERS):
            block = ckpt.block(index)
            linears = {
                role: LinearWeights(quantize(torch.as_tensor(part.weight), 4, 32, symmetric), part.bias)
                for role, part in block.linears.items()
            }
            writer.write_block(index, BlockWeights(index, linears, block.norms))
        writer.finish_files()
        out.finish({"kind": "awq", "bits": 4})
    return folder


def our_logits(folder: Path) -> Tensor:
    model = Model.from_checkpoint(open_checkpoint(folder), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return torch.as_tensor(model(IDS, torch.arange(len(IDS)), causal_attend(1, len(IDS), model.config)))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_loads_compressed_tensors(family: str, symmetric: bool, tmp_path: Path) -> None:
    """Dequantized at load, each weight rounded once to the float16 of the scales: 2^-11 of it."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors (extra dev) is not installed")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = write_awq(tmp_path / "awq", family, symmetric)
    pack_folder(open_checkpoint(source), tmp_path / "ct", "compressed-tensors")
    settings = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ct", dtype=torch.float32, quantization_config=settings
    ).eval()
    with torch.no_grad():
        found = model(IDS[None]).logits[0]
    wanted = our_logits(source)
    assert float((found - wanted).norm() / wanted.norm()) <= 2e-3
    assert float((found.argmax(-1) == wanted.argmax(-1)).float().mean()) == 1.0


def test_mlx_loads_our_folder(tmp_path: Path) -> None:
    mlx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install mlx mlx-cpu mlx-lm")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    source = write_awq(tmp_path / "awq", "llama", False)
    pack_folder(open_checkpoint(source), tmp_path / "mlx", "mlx")
    model, _ = utils.load_model(tmp_path / "mlx")
    model.set_dtype(mlx.float32)
    found = torch.tensor(model(mlx.array([IDS.tolist()]))[0].astype(mlx.float32).tolist())
    wanted = our_logits(source)
    assert float((found - wanted).norm() / wanted.norm()) <= 2e-3
