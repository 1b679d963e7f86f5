"""A block through every preset: order against plain rounding, exact format, exact folding, damaged input."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_blocks import SHAPES, block_of, config_of, stream_of

from convert.checkpoint import BlockWeights, LinearWeights
from convert.errors import InputError
from kernels.int4 import Quantized
from quant.block_task import BlockResult, Streams
from quant.blocks import quantize_block
from quant.config import QuantConfig
from quant.recipes import Recipe, recipe_named, with_settings
from quant.search import experts
from quant.search.scale_and_clip import choose_scale
from quant.statistics.chunked_block import ChunkedBlock
from quant.statistics.gram import InputStatistics

PRESETS = ("gptq", "gptq-r", "awq", "fast", "default", "best")


def short(preset: str, steps: int) -> Recipe:
    """The preset with so many steps of learned rounding, where it learns."""
    recipe = recipe_named(preset)
    return recipe if recipe.learning is None else with_settings(recipe, learning={"steps": steps})


def run(family: str, preset: str, **options: Any) -> tuple[BlockResult, BlockWeights, torch.Tensor]:
    config = config_of(family)
    block, x = block_of(config), stream_of(config)
    quant = QuantConfig(preset=short(preset, 24), group_size=32, **options)  # type: ignore[arg-type]
    shared = preset in ("fast", "gptq", "gptq-r")
    with torch.no_grad():
        result = quantize_block(
            block, config, quant, Streams(x, x if shared else x.clone()), "cpu", torch.float32
        )
    return result, block, x


def output_error(family: str, block: BlockWeights, weights: BlockWeights, x: torch.Tensor) -> float:
    parts = ChunkedBlock(config_of(family), x)
    good, bad = parts.block(x, parts.dense(block)), parts.block(x, parts.dense(weights))
    return float((good - bad).pow(2).mean())


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_beats_plain_rounding_on_the_output_of_every_family(family: str, preset: str) -> None:
    result, block, x = run(family, preset)
    plain, _, _ = run(family, "rtn")
    assert output_error(family, block, result.weights, x) < output_error(family, block, plain.weights, x)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("bits", (4, 3, 2))
def test_no_linear_is_above_plain_rounding_in_the_loss_that_is_judged(family: str, bits: int) -> None:
    for preset in ("fast", "default", "awq"):
        result, _, _ = run(family, preset, bits=bits)
        for report in result.reports:
            assert report.loss_after <= report.loss_rtn * (1 + 1e-5), (preset, report)


def test_results_are_integers_within_range_with_fp16_scales() -> None:
    result, _, _ = run("llama", "best", bits=3)
    for part in result.weights.linears.values():
        assert isinstance(part.weight, Quantized)
        assert part.weight.codes.dtype == torch.uint8 and int(part.weight.codes.max()) <= 7
        assert int(part.weight.zeros.max()) <= 7
        assert part.weight.scales.dtype == torch.float16 and bool((part.weight.scales > 0).all())
    assert all(norm.dtype == torch.float16 for norm in result.weights.norms.values())


@pytest.mark.parametrize("preset", ("default", "best", "awq"))
def test_the_same_seed_gives_the_same_bytes(preset: str) -> None:
    first, _, _ = run("qwen2", preset)
    second, _, _ = run("qwen2", preset)
    for role, part in first.weights.linears.items():
        other = second.weights.linears[role].weight
        assert isinstance(part.weight, Quantized) and isinstance(other, Quantized)
        assert torch.equal(part.weight.codes, other.codes) and torch.equal(part.weight.scales, other.scales)


def test_streams_after_a_block_are_what_the_blocks_compute() -> None:
    result, block, x = run("llama", "default")
    parts = ChunkedBlock(config_of("llama"), x)
    assert result.streams is not None
    torch.testing.assert_close(result.streams.fp, parts.block(x, parts.dense(block)), rtol=1e-4, atol=1e-4)
    # scales of v and up move by half an fp16 step when o and down fold theirs back
    torch.testing.assert_close(
        result.streams.quantized, parts.block(x, parts.dense(result.weights)), rtol=1e-2, atol=1e-2
    )


def test_a_preset_that_ignores_the_float_stream_returns_one_stream() -> None:
    result, _, _ = run("llama", "fast")
    assert result.streams is not None and result.streams.fp is result.streams.quantized


def test_the_tap_sees_keys_and_values_of_the_finished_block() -> None:
    config = config_of("llama")
    block, x = block_of(config), stream_of(config, samples=8)
    seen: dict[str, list[torch.Tensor]] = {}
    quant = QuantConfig(preset="default", group_size=32)
    with torch.no_grad():
        result = quantize_block(
            block, config, quant, Streams(x, x.clone()), "cpu", torch.float32,
            tap=lambda name, value: seen.setdefault(name, []).append(value),
        )  # fmt: skip
        parts, wanted = ChunkedBlock(config, x), dict[str, list[torch.Tensor]]()
        parts.block(
            x, parts.dense(result.weights), lambda name, value: wanted.setdefault(name, []).append(value)
        )
    torch.testing.assert_close(torch.cat(seen["v"]), torch.cat(wanted["v"]))
    torch.testing.assert_close(torch.cat(seen["k"]), torch.cat(wanted["k"]))


def test_a_nan_weight_is_refused_by_name() -> None:
    config = config_of("llama")
    block = block_of(config)
    weight = block.linears["up"].weight
    assert isinstance(weight, torch.Tensor)
    weight[3, 5] = torch.nan
    with pytest.raises(InputError, match=r"Block 0, up: 1 weights are NaN"):
        quantize_block(block, config, QuantConfig(preset="rtn", group_size=32), None, "cpu", torch.float32)


def test_a_ragged_linear_is_refused_or_kept_as_asked() -> None:
    config = replace(config_of("llama"), intermediate_size=272)
    block, x = block_of(config), stream_of(config, samples=8)
    quant = QuantConfig(preset="default", group_size=32)
    with pytest.raises(InputError, match=r"down: K = 272 is no multiple of the group size 32"):
        quantize_block(block, config, quant, Streams(x, x.clone()), "cpu", torch.float32)
    kept = quantize_block(
        block, config, replace(quant, keep_ragged=True), Streams(x, x.clone()), "cpu", torch.float32
    )
    assert isinstance(kept.weights.linears["down"].weight, torch.Tensor)
    assert isinstance(kept.weights.linears["up"].weight, Quantized)


def test_rows_of_activations_that_are_not_finite_are_left_out_and_counted() -> None:
    config = config_of("llama")
    block, x = block_of(config), stream_of(config)
    x[2, -1, 7] = torch.inf  # the last token of a sample: no other attends to it
    result = quantize_block(
        block, config, QuantConfig(preset="fast", group_size=32), Streams(x, x), "cpu", torch.float32
    )
    assert any("1 tokens with a NaN" in warning for report in result.reports for warning in report.warnings)
    x[:, -8:] = torch.nan
    with pytest.raises(InputError, match="q, k, v: 256 of 1536 tokens"):
        quantize_block(
            block, config, QuantConfig(preset="fast", group_size=32), Streams(x, x), "cpu", torch.float32
        )


def test_dead_channels_and_dead_rows_have_a_finite_result_and_are_reported() -> None:
    config = config_of("llama")
    block, x = block_of(config), stream_of(config)
    x[..., :40] = 0
    for role, part in block.linears.items():
        assert isinstance(part.weight, torch.Tensor)
        part.weight[:5] = 0
        block.linears[role] = LinearWeights(part.weight, part.bias)
    for preset in PRESETS:
        quant = QuantConfig(preset=short(preset, 8), group_size=32)
        result = quantize_block(block, config, quant, Streams(x, x.clone()), "cpu", torch.float32)
        assert result.streams is not None and bool(result.streams.quantized.isfinite().all())
        if preset != "awq":
            assert any(
                "40 input channels are zero" in w for report in result.reports for w in report.warnings
            )


def test_an_expert_that_no_token_reaches_is_quantized_all_the_same() -> None:
    config = config_of("mixtral")
    block, x = block_of(config), stream_of(config, samples=8)
    router = block.linears["router"].weight
    assert isinstance(router, torch.Tensor)
    block.linears["router"] = LinearWeights(torch.zeros_like(router))  # ties go to the first experts
    result = quantize_block(
        block, config, QuantConfig(preset="fast", group_size=32), Streams(x, x), "cpu", torch.float32
    )
    assert all(
        isinstance(p.weight, Quantized) for role, p in result.weights.linears.items() if role != "router"
    )


def test_awq_is_searched_on_what_the_quantized_model_reads() -> None:
    """Another float stream changes nothing; another quantized stream does."""
    config = config_of("llama")
    block, x, other = block_of(config), stream_of(config), stream_of(config, seed=2).flip(-1)
    quant = QuantConfig(preset="awq", group_size=32)

    def codes(streams: Streams) -> torch.Tensor:
        weights = quantize_block(block, config, quant, streams, "cpu", torch.float32).weights
        parts = [part.weight for part in weights.linears.values()]
        return torch.cat([part.codes.flatten() for part in parts if isinstance(part, Quantized)])

    expected = codes(Streams(x, x))
    assert torch.equal(codes(Streams(other, x)), expected)
    assert not torch.equal(codes(Streams(x, other)), expected)


@pytest.mark.parametrize(("preset", "dimensions"), [("fast", 2), ("default", 1)])
def test_experts_share_a_scale_that_is_judged_as_all_others_are(
    preset: str, dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the inputs where nothing follows (K, K), by what compensation leaves of each column (K,) where it does."""
    seen = []

    def choose(stack: Any, stats: InputStatistics, *rest: Any) -> Any:
        seen.append(stats.gram.ndim)
        return choose_scale(stack, stats, *rest)

    monkeypatch.setattr(experts, "choose_scale", choose)
    run("mixtral", preset)
    assert seen == [dimensions]
