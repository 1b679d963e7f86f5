"""Group F of the fault table: NaN, infinities and degenerate numbers, through the commands a user gives."""

import json

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import FAST, files_of, run, write_runnable, write_text
from toy_blocks import config_of

import quant.search.scale_and_clip as scaling_module
from convert.readers import open_checkpoint
from kernels.int4 import Quantized
from quant.config import QuantConfig
from quant.search.scales.folding import kv_fold, norm_fold
from quant.search.solve import solve
from quant.search.stack import Stack
from quant.statistics.gram import observe


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("numbers")
    write_runnable(folder / "model", layers=2)
    write_text(folder / "text.txt")
    return folder


def changed(place, folder, change, **config):
    """A copy of the tiny model with changed tensors."""
    write_runnable(folder, layers=2, **config)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def quantize(place, model, out, *flags):
    return run("quantize", "awq", model, "-o", out, "--calib-data", place / "text.txt", *FAST, *flags)


def dense(out):
    ckpt = open_checkpoint(out)
    return [
        part.weight.dequantize()
        for index in range(ckpt.config.num_layers)
        for part in ckpt.block(index).linears.values()
        if isinstance(part.weight, Quantized)
    ]


O_PROJ = "model.layers.1.self_attn.o_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("case", ["F55-nan", "F55-inf"])
def test_a_damaged_weight_is_named_and_nothing_looks_finished(case, place, tmp_path):
    def spoil(tensors):
        tensors[O_PROJ][3, 5] = float(case.removeprefix("F55-"))

    model = changed(place, tmp_path / "model", spoil)
    done = quantize(place, model, tmp_path / "out", "--preset", "fast")
    assert done.returncode == 3 and O_PROJ in done.stderr
    assert not (tmp_path / "out" / "tmq" / "manifest.json").exists()
    assert run("evaluate", "ppl", tmp_path / "out").returncode == 3


def test_damage_outside_the_blocks_shows_before_the_first_of_them(place, tmp_path):
    def spoil(tensors):
        tensors["model.norm.weight"][7] = float("inf")

    done = quantize(place, changed(place, tmp_path / "model", spoil), tmp_path / "out", "--preset", "fast")
    assert done.returncode == 3 and "model.norm.weight" in done.stderr
    assert "layer 1/2" not in done.stderr


@pytest.mark.parametrize("preset", ["gptq", "awq", "fast", "default"])
def test_F58_zero_channels_and_constant_groups(preset, place, tmp_path):
    """Dead channels of up (so zero inputs of down), all-zero rows and groups, constant groups: finite, and said to be zero."""

    def degenerate(tensors):
        tensors[UP][:8] = 0
        tensors[DOWN][:, 32:64] = 0
        tensors[DOWN][4] = 0
        tensors[O_PROJ][:, :32] = 0.25

    model = changed(place, tmp_path / "model", degenerate)
    done = quantize(place, model, tmp_path / "out", "--preset", preset)
    assert done.returncode == 0, done.stderr
    assert all(bool(weight.isfinite().all()) for weight in dense(tmp_path / "out"))
    down = open_checkpoint(tmp_path / "out").block(0).linears["down"].weight.dequantize()
    if preset in ("awq", "fast"):  # error compensation may move other columns' errors into a zero, on purpose
        assert float(down[4].abs().max()) == 0 and float(down[:, 32:64].abs().max()) < 1e-3


def test_F60_scales_stay_within_fp16(place, tmp_path):
    def extreme(tensors):
        tensors[UP][:, 0] *= 1e4
        tensors[DOWN] *= 1e-4

    model = changed(place, tmp_path / "model", extreme)
    done = quantize(place, model, tmp_path / "out", "--preset", "default")
    assert done.returncode == 0, done.stderr
    assert all(bool(weight.isfinite().all()) for weight in dense(tmp_path / "out"))


@pytest.mark.parametrize("case", ["F57-values-beyond-fp16"])
def test_a_bf16_value_that_fp16_lacks_stops_the_run(case, place, tmp_path):
    def overflow(tensors):
        for name in list(tensors):
            tensors[name] = tensors[name].bfloat16()
        tensors["model.layers.0.input_layernorm.weight"][0] = 1e5

    model = changed(place, tmp_path / "model", overflow, torch_dtype="bfloat16")
    done = run("quantize", "awq", model, "-o", tmp_path / "out", "--preset", "rtn", *FAST)
    assert done.returncode == 3 and "float16" in done.stderr
    assert not (tmp_path / "out" / "tmq" / "manifest.json").exists()


def test_F56_activations_that_overflow_stop_the_run_by_layer(place, tmp_path):
    """float16 activations overflow in this model; the float32 forward of the CPU must not hide a real infinity either."""

    def spoil(tensors):
        tensors["model.layers.0.post_attention_layernorm.weight"][:] = 6e4
        tensors[UP][:] = 6e4
        tensors["model.layers.0.mlp.gate_proj.weight"][:] = 6e4
        tensors[DOWN][:] = 6e4

    model = changed(place, tmp_path / "model", spoil)
    done = quantize(place, model, tmp_path / "out", "--preset", "fast")
    if done.returncode != 0:  # float32 holds values up to 3e38; where sums pass it, the layer is named
        assert done.returncode == 3 and ("NaN" in done.stderr or "float16" in done.stderr)
    else:
        assert all(bool(weight.isfinite().all()) for weight in dense(tmp_path / "out"))


def test_F61_a_kv_head_without_values_gets_a_defined_range(place, tmp_path):
    def silence(tensors):
        tensors["model.layers.1.self_attn.k_proj.weight"][:16] = 0  # head 0: K is zero everywhere
        tensors["model.layers.1.self_attn.v_proj.weight"][:16] = 0

    model = changed(place, tmp_path / "model", silence)
    done = quantize(place, model, tmp_path / "out", "--preset", "rtn", "--kv-bits", 8)
    assert done.returncode == 0, done.stderr
    table = load_file(tmp_path / "out" / "tmq" / "kv_params.safetensors")
    scale, zero = table["layers.1.k.scale"], table["layers.1.k.zero"]
    assert float(scale[0]) > 0 and bool(torch.isfinite(scale).all())
    assert abs(float((0 - zero[0]) / scale[0]).__round__()) <= 128  # zero itself has a code
    done = run("evaluate", "ppl", tmp_path / "out", "--kv-bits", 8, "--kv-mode", "static", "--windows", 2)
    assert done.returncode == 0, done.stderr


def test_F62_an_expert_that_no_token_reaches_is_named(place, tmp_path):
    folder = tmp_path / "moe"
    tensors = {}
    for name, value in tiny_models.random_tensors("mixtral").items():
        vocabulary = value.shape[0] == tiny_models.VOCAB
        tensors[name] = torch.cat([value, value, value[:8]]) if vocabulary else value
    router = "model.layers.0.block_sparse_moe.gate.weight"
    tensors[router] = torch.zeros_like(
        tensors[router]
    )  # equal scores: the first two experts are always chosen
    tiny_models.write_model(folder, "mixtral", tensors=tensors, vocab_size=264)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((place / "model" / name).read_bytes())
    done = run(
        "quantize",
        "calibrate",
        folder,
        "-o",
        tmp_path / "s",
        "--calib-data",
        place / "text.txt",
        "--samples",
        4,
        "--seqlen",
        32,
    )
    assert (
        done.returncode == 0 and "layer 0: no token of the calibration text reaches expert 2" in done.stderr
    )
    done = quantize(place, folder, tmp_path / "out", "--preset", "fast")
    assert done.returncode == 0, done.stderr
    assert "experts.2" in done.stderr + done.stdout
    assert all(bool(weight.isfinite().all()) for weight in dense(tmp_path / "out"))


def test_F64_layers_above_rtn_and_far_losses_are_listed_and_no_sentinel_is_printed():
    from quant.evaluation.layer_report import above_rtn, far_above

    def entry(layer, rtn, after):
        return {"layer": layer, "role": "down", "loss_rtn": rtn, "loss_after": after, "steps": []}

    layers = [
        entry(0, 2.0, 1.0),
        entry(1, 2.0, 1.1),
        entry(2, 2.0, 3.0),
        entry(3, 200.0, 100.0),
        entry(4, 1.0, None),
    ]
    assert [line.split(":")[0] for line in above_rtn(layers)] == ["layer 2, down"]
    found = far_above(layers)
    assert any("layer 3, down" in line and "times the median" in line for line in found)
    assert any("layer 4, down: its loss is not a finite number" in line for line in found)
    assert "inf" not in " ".join(found) and "nan" not in " ".join(found).lower()


def test_the_manifest_holds_plain_numbers(place, tmp_path):
    done = quantize(place, place / "model", tmp_path / "out", "--preset", "default", "--json")
    assert done.returncode == 0
    json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    text = (tmp_path / "out" / "tmq" / "manifest.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the manifest"))
    assert str(tmp_path) not in text  # no absolute path
    assert all(str(tmp_path).encode() not in raw for raw in files_of(tmp_path / "out").values())


TEXTS = {
    "F65-empty": "",
    "F65-one-token": "x",
    "F65-shorter-than-a-window": "too short for one window",
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_measures_nothing_is_refused(case, place, tmp_path):
    (tmp_path / "t.txt").write_text(TEXTS[case])
    done = run("evaluate", "ppl", place / "model", "--text", tmp_path / "t.txt")
    assert done.returncode == 3 and "error:" in done.stderr and "Traceback" not in done.stderr


def test_F65_a_model_that_gives_no_number_is_refused(place, tmp_path):
    def blow_up(tensors):
        for name in (UP, DOWN, "model.layers.0.mlp.gate_proj.weight"):
            tensors[name][:] = 6e4
        tensors["model.norm.weight"][:] = 6e4
        tensors["lm_head.weight"][:] = 6e4

    model = changed(place, tmp_path / "model", blow_up)
    done = run("evaluate", "ppl", model, "--windows", 1)
    if done.returncode != 0:
        assert done.returncode == 3 and "loss of window 0" in done.stderr
    else:
        assert "nan" not in done.stdout.lower() and "inf" not in done.stdout.lower()


@pytest.mark.parametrize("case", ["F59-no-finite-candidate"])
def test_a_grid_without_a_finite_loss_keeps_scale_one_and_says_so(case, monkeypatch):
    """Every candidate's loss is NaN: the layer is rounded with scale 1, finite, and its report says why."""
    config = QuantConfig(preset="fast", group_size=32)
    recipe = config.recipe
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    stack = Stack(weight, ("up", "gate"), (8, 8))
    stats = observe([torch.randn(8, 160, 64, generator=torch.Generator().manual_seed(3))], "up, gate")
    monkeypatch.setattr(
        scaling_module,
        "score_candidates",
        lambda weight, scales, *_: torch.full((len(scales), 2), float("nan")),
    )
    solution, reports = solve(
        stack, stats, norm_fold(torch.ones(64)), recipe.steps, recipe.effort_on("cpu"), config
    )
    assert torch.equal(solution.channel_scale, torch.ones(64))
    assert solution.weight().isfinite().all()
    for report in reports:
        assert "no candidate scale has a finite loss: scale 1 is kept" in report.warnings
        assert report.loss_after <= report.loss_rtn


@pytest.mark.parametrize("case", ["F63-grouped-heads"])
def test_v_and_o_of_grouped_heads_share_a_scale_per_kv_channel(case):
    """4 query heads on 2 KV heads: o's 128 columns take the 64 scales of v's rows, each twice, head by head."""
    config = config_of("llama")
    fold = kv_fold(torch.randn(64, 128), config)
    scale = torch.arange(1.0, 65.0)
    spread = fold.spread(scale)
    heads = spread.view(4, 32)
    assert torch.equal(heads[0], scale[:32]) and torch.equal(heads[1], scale[:32])
    assert torch.equal(heads[2], scale[32:]) and torch.equal(heads[3], scale[32:])
    assert torch.equal(fold.shrink(spread), scale)
