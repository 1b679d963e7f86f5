"""Newer families from a published folder to a packed one: what transformers computes with its weights is what our engine computes.

The packed folder is unpacked here by a few lines of our own and loaded by transformers; nothing of the writer is used.
"""

from pathlib import Path

import family_models
import pytest
import tiny_runs
import torch
from family_runs import TEXT, VOCAB, dequantize, our_logits, their_logits, write_source

import turbomind_quant as tmq


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
