"""Factors moved from K into Q: the block stays the same function, its K fits one scale a head, runs repeat and resume."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import files_of, run, write_runnable, write_text
from toy_blocks import block_of, config_of, stream_of

from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import ModelConfig
from engine.model.attention import causal_attend
from engine.model.kv_simulation import KVSimulation
from kernels.int4 import quantize
from kernels.kv.pages import StaticKV
from quant.config import QuantConfig
from quant.kv.key_smoothing import key_channels, key_factors, smooth_channels, smooth_keys
from quant.kv.parameters import kv_parameters
from quant.session import Session
from quant.settings import KEY_SMOOTHING
from quant.state.fingerprint import run_fingerprint
from quant.statistics.block import BlockStatistics
from quant.statistics.chunked_block import ChunkedBlock

FAMILIES = ("llama", "qwen2", "qwen3", "internlm", "mixtral")
OUTLIERS = (3, 5, 11)  # RoPE pairs, of 16


def planted(family: str, size: float = 12.0) -> tuple[ModelConfig, BlockWeights, torch.Tensor]:
    """A block whose K has a few pairs `size` times as large as the others, whatever its Q makes of them."""
    config = config_of(family)
    block, x = block_of(config), stream_of(config, samples=4)
    factors = torch.ones(config.num_kv_heads, config.head_dim)
    for pair in OUTLIERS:
        factors[:, [pair, pair + config.head_dim // 2]] = 1 / size
    return config, smooth_keys(block, config, factors), x


def smoothed(config: ModelConfig, block: BlockWeights, x: torch.Tensor) -> tuple[BlockWeights, torch.Tensor]:
    factors = key_factors(block, config, key_channels(block, config, x))
    return smooth_keys(block, config, factors), factors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_float_block_computes_what_it_did(family: str) -> None:
    config, block, x = planted(family)
    done, factors = smoothed(config, block, x)
    assert float(factors.max() / factors.min()) > 3
    parts = ChunkedBlock(config, x)
    out, wanted = parts.block(x, parts.dense(done)), parts.block(x, parts.dense(block))
    assert float((out - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_ranges_are_those_that_the_block_has_afterwards(family: str) -> None:
    config, block, x = planted(family)
    channels = key_channels(block, config, x)
    parts, seen = ChunkedBlock(config, x), BlockStatistics(0)
    parts.block(x, parts.dense(block), seen.tap_ranges)  # with attention and all
    torch.testing.assert_close(channels, (seen.low["k"], seen.high["k"]), rtol=1e-5, atol=1e-5)
    done, factors = smoothed(config, block, x)
    found = key_channels(done, config, x)
    torch.testing.assert_close(found, smooth_channels(channels, factors), rtol=1e-4, atol=1e-5)


def attention_error(config: ModelConfig, block: BlockWeights, x: torch.Tensor) -> float:
    """Of the attention part with K behind static int8, relative."""
    parts, seen = ChunkedBlock(config, x), BlockStatistics(0)
    dense, h = parts.dense(block), parts.norm(x, block.norms["attn_norm"])
    wanted = parts.attention(h, dense, seen.tap_ranges)
    table, _ = kv_parameters([seen.head_ranges()])
    names = ("k.scale", "k.zero", "v.scale", "v.zero")
    cache = KVSimulation(8, "static", [StaticKV(*(table[f"layers.0.{name}"] for name in names))])
    plain = causal_attend(len(x), x.shape[1], config)
    stored = parts.block(
        x,
        parts.dense(replace(block, linears={**block.linears, **silent(config, block)})),
        attend=lambda layer, q, k, v: plain(layer, q, cache(layer, k, v)[0], v),
    )
    return float((stored - x - wanted).norm() / wanted.norm())


def silent(config: ModelConfig, block: BlockWeights) -> dict[str, LinearWeights]:
    """The MLP's last linears as zeros, so that a block gives its attention part alone."""
    return {
        role: LinearWeights(torch.zeros_like(part.weight))  # type: ignore[arg-type]
        for role, part in block.linears.items()
        if role.endswith("down")
    }


@pytest.mark.parametrize("family", ("llama", "qwen2", "qwen3"))
def test_a_static_int8_cache_loses_a_third_of_what_it_did(family: str) -> None:
    config, block, x = planted(family)
    done, _ = smoothed(config, block, x)
    before, after = attention_error(config, block, x), attention_error(config, done, x)
    assert 0 < after < before / 3


@pytest.mark.parametrize("family", ("llama", "qwen2"))
def test_factors_are_shared_by_a_pair_and_level_in_a_head(family: str) -> None:
    config, block, x = planted(family)
    _, factors = smoothed(config, block, x)
    half = config.head_dim // 2
    assert torch.equal(factors[:, :half], factors[:, half:])
    torch.testing.assert_close(factors.log().mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    others = [j for j in range(half) if j not in OUTLIERS]
    assert bool((factors[:, OUTLIERS].amin(1) > factors[:, others].amax(1)).all())


def test_heads_share_factors_where_norms_carry_them() -> None:
    config, block, x = planted("qwen3")
    done, factors = smoothed(config, block, x)
    assert torch.equal(factors[0], factors[1])
    assert done.linears is block.linears
    torch.testing.assert_close(
        done.norms["q_norm"] * done.norms["k_norm"], block.norms["q_norm"] * block.norms["k_norm"]
    )


def test_query_heads_take_the_factors_of_their_kv_head() -> None:
    config, block = config_of("llama"), block_of(config_of("llama"))  # 4 heads, 2 KV heads of size 32
    factors = torch.cat([torch.full((1, 32), 2.0), torch.full((1, 32), 0.5)])
    done = smooth_keys(block, config, factors)
    rows = {"q": [2.0] * 64 + [0.5] * 64, "k": [0.5] * 32 + [2.0] * 32}
    for role, wanted in rows.items():
        assert torch.equal(
            done.linears[role].weight, block.linears[role].weight * torch.tensor(wanted)[:, None]
        )  # type: ignore[operator]
    assert done.linears["v"] is block.linears["v"]


def test_factors_where_ranges_say_nothing() -> None:
    config, block = config_of("llama"), block_of(config_of("llama"))
    high = torch.ones(2, 32)
    high[0, [1, 17]] = 0  # a dead pair
    high[0, 2] = torch.inf  # a range that is no number
    high[0, 3] = 1e5  # an absurd one
    high[1] = 0  # a dead head
    factors = key_factors(block, config, (-high, high))
    assert bool(factors.isfinite().all()) and float(factors.amax()) == KEY_SMOOTHING.limit
    assert bool((factors[0, [1, 17, 2, 18]] == 1).all()) and bool((factors[1] == 1).all())
    assert smooth_keys(block, config, torch.ones(2, 32)) is block
    linears = {**block.linears, "q": LinearWeights(quantize(torch.randn(128, 128), 4, 32))}
    assert bool((key_factors(replace(block, linears=linears), config, (-high, high)) == 1).all())


def test_nothing_that_is_scaled_leaves_fp16() -> None:
    config, block, x = planted("qwen2", size=100.0)
    linears = dict(block.linears)
    for role, size in (("q", 3e4), ("k", 6e4)):
        part = linears[role]
        assert isinstance(part.weight, torch.Tensor) and part.bias is not None
        linears[role] = LinearWeights(part.weight, part.bias * size / part.bias.abs().amax())
    done, _ = smoothed(config, replace(block, linears=linears), x)
    for role in ("q", "k"):
        bias = done.linears[role].bias
        assert bias is not None and bool(bias.half().isfinite().all())


def test_runs_with_and_without_smoothing_are_told_apart() -> None:
    class Source:
        config = config_of("llama")

        def digest(self) -> str:
            return "0"

    def table(kv_bits: int) -> dict[str, object]:
        quant = QuantConfig(kv_bits=kv_bits)
        session = Session(Source(), torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
        return run_fingerprint("awq", session, quant, None)

    assert "smoothing of K" in table(8) and "smoothing of K" not in table(16)


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("keys")
    write_runnable(folder / "model", layers=3)
    write_text(folder / "text.txt")
    return folder


def arguments(place, out, preset):
    text = ("--calib-data", place / "text.txt", "--samples", 4, "--seqlen", 32, "--device", "cpu")
    return ("awq", place / "model", "-o", out, *text, "--group-size", 32, "--kv-bits", 8, "--preset", preset)


def killed_before_layer(number):
    """SIGKILL once the state before this layer is saved."""

    def prepare():
        from quant.state.frontier import Frontier

        save = Frontier.save

        def saved(self, index, tensors):
            save(self, index, tensors)
            if index == number:
                os.kill(os.getpid(), signal.SIGKILL)

        Frontier.save, Frontier.is_due = saved, lambda self, tensors: True

    return prepare


@pytest.mark.parametrize("preset", ("rtn", "awq", "fast", "default"))
def test_a_run_says_what_it_moved_and_resumes_to_the_same_bytes(preset, place, tmp_path):
    assert run("quantize", *arguments(place, tmp_path / "quiet", preset)).returncode == 0
    killed = run("quantize", *arguments(place, tmp_path / "out", preset), prepare=killed_before_layer(2))
    assert killed.returncode == -signal.SIGKILL
    done = run("quantize", *arguments(place, tmp_path / "out", preset))
    assert done.returncode == 0 and "channels of K made alike" in done.stdout, done.stderr
    assert files_of(tmp_path / "out") == files_of(tmp_path / "quiet")
    manifest = json.loads((tmp_path / "out/tmq/manifest.json").read_text())
    assert len(manifest["key_factors"]) == 3
    assert all(
        1 / KEY_SMOOTHING.limit <= low < 1 < high <= KEY_SMOOTHING.limit
        for low, high in manifest["key_factors"]
    )
    assert json.loads((tmp_path / "out/tmq/report.json").read_text())["resumed_at_layer"] == 2
    checked = run("quantize", "verify", tmp_path / "out", "--source", place / "model")
    assert checked.returncode == 0, checked.stdout


def test_without_kv_parameters_nothing_is_moved(place, tmp_path):
    plain = ("awq", place / "model", "-o", tmp_path / "out", "--group-size", 32, "--preset", "rtn")
    assert run("quantize", *plain, "--device", "cpu").returncode == 0
    assert json.loads((tmp_path / "out/tmq/manifest.json").read_text())["key_factors"] is None


def test_saved_statistics_give_the_factors_of_the_text(place, tmp_path):
    assert run("quantize", *arguments(place, tmp_path / "text", "fast")).returncode == 0
    text = arguments(place, tmp_path / "stats", "fast")[4:12]
    assert run("quantize", "calibrate", place / "model", "-o", tmp_path / "stats", *text).returncode == 0
    options = ("--group-size", 32, "--kv-bits", 8, "--preset", "fast", "--stats", tmp_path / "stats")
    assert run("quantize", "awq", place / "model", "-o", tmp_path / "saved", *options).returncode == 0
    found = [tmp_path / name for name in ("text", "saved")]
    first = [json.loads((p / "tmq/manifest.json").read_text())["key_factors"][0] for p in found]
    assert first[0] == pytest.approx(first[1], rel=1e-5)  # before the first block both streams are one
    scales = [load_file(p / "tmq/kv_params.safetensors")["layers.0.k.scale"] for p in found]
    torch.testing.assert_close(
        scales[0], scales[1], rtol=0.1, atol=0
    )  # the quantized K against the float one
