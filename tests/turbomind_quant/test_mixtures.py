"""Mixtures of experts through the whole run: both layouts of published checkpoints, experts that hardly any token reaches."""

import json
from pathlib import Path
from typing import Any

import family_models
import pytest
import tiny_runs
import torch
from family_runs import TEXT, tensors_of, write_source
from safetensors.torch import load_file, save_file

import turbomind_quant as tmq
from convert.readers import open_checkpoint


def fuse(source: Path, target: Path, family: str) -> Path:
    """The same model with its experts in 3-D tensors, as transformers 5 has them in memory."""
    target.mkdir()
    tensors = tensors_of(source)
    for prefix in sorted(
        {name.split("experts.")[0] + "experts." for name in tensors if ".experts.0." in name}
    ):
        count = sum(name.startswith(prefix) and name.endswith("gate_proj.weight") for name in tensors)
        gates, ups, downs = (
            [tensors.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(count)]
            for part in ("gate", "up", "down")
        )
        pairs = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        tensors[prefix + "gate_up_proj"], tensors[prefix + "down_proj"] = (
            torch.stack(pairs),
            torch.stack(downs),
        )
    save_file(tensors, target / "model.safetensors")
    for path in source.glob("*.json"):
        if "index" not in path.name:
            (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "glm4_moe"])
def test_both_layouts_of_a_model_give_the_same_bytes(family: str, tmp_path: Path) -> None:
    write_source(family, tmp_path / "m")
    fused = fuse(tmp_path / "m", tmp_path / "fused", family)
    text = str(tiny_runs.write_text(tmp_path / "text.txt"))
    for source, name in ((tmp_path / "m", "a"), (fused, "b")):
        tmq.quantize(source, tmp_path / name, preset="default", calib_data=text, **TEXT)
    a, b = (tiny_runs.files_of(tmp_path / name) for name in "ab")
    assert a.keys() == b.keys()
    shards = [name for name in a if name.endswith(".safetensors")]
    assert len(shards) > 2 and all(a[name] == b[name] for name in shards)
    assert a["config.json"] == b["config.json"]
    accounted = json.loads(b["tmq/manifest.json"])["tensors"]
    held = [name for name in tensors_of(fused) if name.endswith(("gate_up_proj", "down_proj"))]
    assert sorted(accounted["split"]) == sorted(held)


def test_a_fused_tensor_of_another_model_is_refused(tmp_path: Path) -> None:
    write_source("qwen3_moe", tmp_path / "m")
    fused = fuse(tmp_path / "m", tmp_path / "fused", "qwen3_moe")
    tensors = load_file(fused / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.down_proj"))
    tensors[name] = tensors[name].transpose(1, 2).contiguous()[:, :, :32].contiguous()
    save_file(tensors, fused / "model.safetensors")
    with pytest.raises(tmq.InputError, match=r"down_proj.*has shape.*all experts"):
        open_checkpoint(fused)


def write_uneven(folder: Path) -> None:
    """A mixture whose expert 0 is never chosen, some others seldom, and whose expert 2 has outliers."""
    write_source("qwen3_moe", folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        tensors[name][0] = (
            0  # never among the first two: four others of mean 0 score higher, or so do their opposites
        )
        tensors[name][4:] = -tensors[name][2:4]
        prefix = name.removesuffix("gate.weight")
        tensors[prefix + "experts.2.down_proj.weight"][:, 3] *= 40
        tensors[prefix + "experts.2.gate_proj.weight"][:, 9] *= 40
    save_file(tensors, path, metadata={"format": "pt"})


def test_experts_that_few_tokens_reach_borrow_statistics_and_the_report_says_so(tmp_path: Path) -> None:
    write_uneven(tmp_path / "m")
    text = str(tiny_runs.write_text(tmp_path / "text.txt"))
    options: dict[str, Any] = TEXT | {"samples": 3}  # 144 tokens, two experts each: about 48 tokens an expert
    tmq.quantize(tmp_path / "m", tmp_path / "q", preset="default", calib_data=text, **options)
    manifest = json.loads((tmp_path / "q" / "tmq" / "manifest.json").read_text())
    reports = [report for report in manifest["layers"] if report["role"].startswith("experts.")]
    counts = {(report["layer"], report["role"]): report["values"]["tokens"] for report in reports}
    assert 0 in counts.values() and any(0 < count < 64 for count in counts.values())
    assert any(count >= 64 for count in counts.values())
    for report in reports:
        says = [warning for warning in report["warnings"] if "borrowed from the whole layer" in warning]
        assert bool(says) == (report["values"]["tokens"] < 64), report
        assert report["loss_after"] <= report["loss_rtn"] * (1 + 1e-6)
    assert any("borrowed" in warning for warning in manifest["warnings"])
    for tensor in tensors_of(tmp_path / "q").values():
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all())
    tmq.calibrate(tmp_path / "m", tmp_path / "stats", calib_data=text, samples=3, seqlen=48, device="cpu")
    tmq.quantize(
        tmp_path / "m",
        tmp_path / "fast",
        preset="fast",
        stats=tmp_path / "stats",
        group_size=32,
        device="cpu",
    )
    assert tmq.verify(tmp_path / "fast", source=tmp_path / "m").passed


def test_routers_are_named_in_full(tmp_path: Path) -> None:
    """ "mlp.gate" alone would also be found in "mlp.gate_proj" by loaders that look for a part of the name."""
    write_source("qwen2_moe", tmp_path / "m")
    tmq.quantize(tmp_path / "m", tmp_path / "q", preset="rtn", **(TEXT | {}))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    skipped = config["quantization_config"]["modules_to_not_convert"]
    routers = [f"model.layers.{i}.mlp.{part}" for i in (0, 2) for part in ("gate", "shared_expert_gate")]
    assert set(skipped) == {"lm_head", *routers}
    names = tensors_of(tmp_path / "q")
    quantized = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
    floats = {
        name.removesuffix(".weight") for name, t in names.items() if name.endswith(".weight") and t.dim() == 2
    } - {"model.embed_tokens"}
    assert all(any(entry in name for entry in skipped) for name in floats)
    assert not any(entry in name for entry in skipped if entry != "lm_head" for name in quantized)
    assert family_models.MODELS["qwen2_moe"][1]["mlp_only_layers"] == [1]
