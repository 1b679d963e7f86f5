"""Newer families from a published folder to a packed one: what transformers computes with its weights is what our engine computes.

The packed folder is unpacked here by a few lines of our own and loaded by transformers; nothing of the writer is used.
"""

import json
from pathlib import Path

import family_models
import pytest
import tiny_runs
import torch
import transformers
from family_runs import TEXT, VOCAB, tensors_of, write_source
from safetensors.torch import save_file
from torch import Tensor

import turbomind_quant as tmq
from convert.readers import open_checkpoint
from engine.model.forward import Model, causal_attend

SHIFTS = [
    4 * place for place in (0, 4, 1, 5, 2, 6, 3, 7)
]  # of column j in a word: nibbles hold 0, 2, 4, 6, 1, 3, 5, 7


def nibbles(words: Tensor) -> Tensor:
    """(R, C // 8) int32 -> (R, C)."""
    return torch.stack([(words >> shift) & 15 for shift in SHIFTS], -1).flatten(1)


def dequantize(folder: Path, target: Path) -> None:
    """A float32 folder with the weights that an AWQ folder stands for."""
    target.mkdir()
    tensors, floats = tensors_of(folder), {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            scales, zeros = tensors[module + ".scales"].float(), nibbles(tensors[module + ".qzeros"])
            repeats = len(tensor) // len(scales)
            codes = nibbles(tensor) - zeros.repeat_interleave(repeats, 0)
            floats[module + ".weight"] = (codes * scales.repeat_interleave(repeats, 0)).t().contiguous()
        elif part not in ("qzeros", "scales"):
            floats[name] = tensor.float()
    save_file(floats, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))


def our_logits(folder: Path, ids: Tensor) -> Tensor:
    model = Model.from_checkpoint(open_checkpoint(folder), "cpu", torch.float32)
    batch, length = ids.shape
    attend = causal_attend(batch, length, model.config)
    return model(ids.flatten(), torch.arange(length).repeat(batch), attend).view(batch, length, -1)


def their_logits(folder: Path, architecture: str, ids: Tensor) -> Tensor:
    kind = getattr(transformers, architecture)
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model(input_ids=ids).logits


@pytest.mark.parametrize("family", family_models.MODELS)
@torch.no_grad()
def test_packed_weights_mean_the_same_to_transformers(family: str, tmp_path: Path) -> None:
    source = write_source(family, tmp_path / "m")
    text = str(tiny_runs.write_text(tmp_path / "text.txt"))
    ids = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    wanted = source(input_ids=ids).logits
    errors = {}
    for preset in ("rtn", "default"):
        out = tmp_path / preset
        options = {} if preset == "rtn" else {"calib_data": text, "kv_bits": 8}
        tmq.quantize(tmp_path / "m", out, preset=preset, **(TEXT | options))
        dequantize(out, tmp_path / f"{preset}-float")
        theirs = their_logits(tmp_path / f"{preset}-float", family_models.MODELS[family][0], ids)
        assert (our_logits(out, ids) - theirs).abs().max() < 1e-3 * theirs.abs().max()
        errors[preset] = float((theirs - wanted).norm())
    assert errors["default"] < errors["rtn"], errors
    report = tmq.verify(tmp_path / "default", source=tmp_path / "m")
    assert report.passed, report
    found = tmq.inspect(tmp_path / "default")
    assert found.family == family and found.problem is None


@pytest.mark.parametrize("family", ["gemma3", "olmo2", "qwen2_moe", "glm4_moe"])
def test_saved_statistics_and_learned_rounding(family: str, tmp_path: Path) -> None:
    write_source(family, tmp_path / "m")
    text = str(tiny_runs.write_text(tmp_path / "text.txt"))
    tmq.calibrate(tmp_path / "m", tmp_path / "stats", calib_data=text, samples=8, seqlen=48, device="cpu")
    tmq.quantize(
        tmp_path / "m",
        tmp_path / "fast",
        preset="fast",
        stats=tmp_path / "stats",
        group_size=32,
        device="cpu",
    )
    tmq.quantize(tmp_path / "m", tmp_path / "best", preset="best", calib_data=text, **TEXT)
    for name in ("fast", "best"):
        assert tmq.verify(tmp_path / name, source=tmp_path / "m").passed
