"""Learned rounding and distillation: what they may change, what they must lower, gradients through the grid."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_blocks import block_of, config_of, stream_of

from convert.checkpoint import BlockWeights, LinearWeights
from convert.errors import UsageError
from kernels.int4 import Quantized
from quant.block_task import Streams
from quant.blocks import quantize_block
from quant.config import QuantConfig
from quant.learn import rounding
from quant.learn.captured_steps import Steps
from quant.learn.distill import distill, splice
from quant.learn.model_forward import OuterWeights
from quant.learn.sensitivity import measure_sensitivity
from quant.learn.training import (
    Adam,
    FlatLinears,
    RoundToGrid,
    ScaleCodes,
    batches,
    repeatable,
    training_attend,
)
from quant.recipes import Recipe, recipe_named
from quant.settings import Distillation, LearnedRounding

GENTLE = LearnedRounding(code_rate=0.3, scale_rate=0.03, norm_rate=0.03, toward_float=1.0, average=0.0)


def best(how: LearnedRounding) -> Recipe:
    """The preset with these settings of learned rounding."""
    return replace(recipe_named("best"), learning=how)


def small_model() -> tuple[list[BlockWeights], OuterWeights, torch.Tensor]:
    config = config_of("llama")
    generator = torch.Generator().manual_seed(3)
    blocks = [block_of(config, seed) for seed in (0, 1)]
    embedding = torch.randn(64, 128, generator=generator)
    tokens = torch.randint(0, 64, (16, 32), generator=generator)
    head = 0.2 * torch.randn(64, 128, generator=generator)
    return blocks, OuterWeights(embedding, torch.ones(128), head), tokens


def test_the_gradient_passes_straight_through_the_grid() -> None:
    latent = torch.tensor([[0.2, 1.6, 9.0, -3.0]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    out = RoundToGrid.apply(latent, scale, torch.tensor([[2.0]]), 7)
    assert out.tolist() == [[0.0, 1.0, 2.5, -1.0]]  # codes 0, 2, clamped to 5 and to -2
    out.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert latent.grad is not None and scale.grad is not None
    assert latent.grad.tolist() == [[0.5, 1.0, 0.0, 0.0]]
    assert scale.grad.tolist() == [[2.0 * 2 + 3.0 * 5 + 4.0 * -2]]


def test_scales_alone_get_the_gradient_of_fixed_codes() -> None:
    scale = torch.tensor([[0.5], [2.0]], requires_grad=True)
    codes = torch.tensor([[1, -2], [3, 0]], dtype=torch.int8)
    ScaleCodes.apply(codes, scale).backward(torch.ones(2, 2))
    assert scale.grad is not None and scale.grad.tolist() == [[-1.0], [3.0]]


def test_flat_weights_are_the_weights_and_come_back_unchanged() -> None:
    config = config_of("qwen2")
    block = block_of(config)
    with torch.no_grad():
        done = quantize_block(
            block, config, QuantConfig(preset="rtn", group_size=32), None, "cpu", torch.float32
        ).weights
    flat = FlatLinears.of([done], "cpu")
    dense = flat.dense(flat.codes * flat.scales, [{}], "cpu")[0]
    again = flat.packed(flat.codes, flat.scales, [{}])[0]
    for role, part in done.linears.items():
        other, back = dense.linears[role].weight, again.linears[role].weight
        assert (
            isinstance(part.weight, Quantized)
            and isinstance(back, Quantized)
            and isinstance(other, torch.Tensor)
        )
        assert torch.equal(part.weight.dequantize(), other)
        assert torch.equal(part.weight.codes, back.codes) and torch.equal(part.weight.scales, back.scales)


def test_what_a_captured_step_reads_beside_the_codes_lies_on_the_device() -> None:
    """Held blocks come from files: a bias copied from the host inside a step would end its capture on a GPU."""
    config = config_of("qwen2")
    with torch.no_grad():
        done = quantize_block(
            block_of(config), config, QuantConfig(preset="rtn", group_size=32), None, "cpu", torch.float32
        ).weights
    loose = LinearWeights(done.linears["down"].weight.dequantize(), None)
    flat = FlatLinears.of([replace(done, linears={**done.linears, "down": loose})], "meta")
    (block,) = flat.blocks
    assert block.linears["q"].bias is not None and block.linears["q"].bias.is_meta
    assert block.linears["down"].weight.is_meta and all(norm.is_meta for norm in block.norms.values())


def test_learned_rounding_lowers_the_error_of_the_block_and_says_so() -> None:
    # 1,536 tokens: far fewer than the rates of the preset are made for
    config = config_of("llama")
    x = stream_of(config)
    quant = QuantConfig(preset=best(replace(GENTLE, steps=40)), group_size=32, bits=3)
    with torch.no_grad():
        result = quantize_block(block_of(config), config, quant, Streams(x, x.clone()), "cpu", torch.float32)
    values = result.reports[0].values
    assert values["block_after"] < 0.97 * values["block_before"]
    assert all("rounding" in report.steps for report in result.reports)


def changed_codes(how: LearnedRounding) -> tuple[float, float, bytes]:
    """Share of codes that learned rounding moved, the loss that it ended at, and the codes of q."""
    config = config_of("llama")
    x = stream_of(config)
    off = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    codes = []
    for preset in ("default", best(replace(how, steps=30))):
        quant = QuantConfig(preset=preset, group_size=32, bits=3)
        with torch.no_grad():
            result = quantize_block(block_of(config), config, quant, Streams(x, off), "cpu", torch.float32)
        weights = [part.weight for part in result.weights.linears.values()]
        codes.append(torch.cat([w.codes.flatten() for w in weights if isinstance(w, Quantized)]))
    moved = float((codes[0] != codes[1]).float().mean())
    return moved, result.reports[0].values["block_after"], codes[1].numpy().tobytes()


def test_nearer_targets_change_what_is_learned() -> None:
    moved, loss, codes = changed_codes(GENTLE)
    _, nearer, other = changed_codes(replace(GENTLE, toward_float=0.0))
    assert moved > 0 and nearer < loss and other != codes  # the block's own output is easier to meet


def test_the_predictable_error_of_earlier_blocks_is_in_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantized stream is a tenth too small: what is missing after the block follows from what is there."""
    config = config_of("llama")
    x = stream_of(config)
    how = replace(GENTLE, toward_float=0.2, steps=30)
    quant = QuantConfig(preset=best(how), group_size=32, bits=3)
    found, aims = [], []

    def learn(done, free_codes, config, max_code, seed, x, y, reports, learning, metric):
        aims.append(y)
        return done, reports

    monkeypatch.setattr(rounding, "learn_block", learn)
    begins = []
    for predict in (lambda begin, *_: begins.append(begin) or begin, rounding.predicted_output):
        monkeypatch.setattr(rounding, "predicted_output", predict)
        with torch.no_grad():
            result = quantize_block(
                block_of(config), config, quant, Streams(x, 0.9 * x), "cpu", torch.float32
            )
        assert result.streams is not None
        found.append(float((aims[-1] - result.streams.fp).pow(2).mean()))
    assert found[1] < 0.5 * found[0]
    torch.testing.assert_close(aims[0], begins[0] + 0.2 * (result.streams.fp - begins[0]))
    assert LearnedRounding() == LearnedRounding(toward_float=0.25, average=0.95, warmup=0.15)


def test_a_block_whose_loss_would_rise_is_left_as_it_was() -> None:
    hasty = LearnedRounding(code_rate=8.0, scale_rate=2.0, norm_rate=2.0, average=0.9, warmup=0.0)
    assert changed_codes(hasty)[0] == 0
    again = changed_codes(replace(hasty, average=0.0))
    assert again[0] == 0 and again[1] == changed_codes(replace(hasty, checks=0))[1]


def test_the_loss_that_is_reported_is_that_of_the_streams_behind_the_metric() -> None:
    config = config_of("llama")
    x, metric = stream_of(config), torch.diag(torch.linspace(0.2, 2, 128))
    how = replace(GENTLE, toward_float=1.0, average=0.5, steps=30)
    quant = QuantConfig(preset=best(how), group_size=32, bits=3)
    with torch.no_grad():
        result = quantize_block(
            block_of(config), config, quant, Streams(x, x.clone()), "cpu", torch.float32, metric=metric
        )
    values, after = result.reports[0].values, result.streams
    assert after is not None and values["block_after"] < values["block_before"]
    found = float(((after.quantized - after.fp) @ metric).pow(2).mean())
    assert values["block_after"] == pytest.approx(found, rel=1e-3)


def test_a_running_mean_changes_what_is_learned() -> None:
    # rates so high that the steps go to and fro: the mean lies lower
    wild = replace(GENTLE, average=0.0, code_rate=3.0, scale_rate=0.3, norm_rate=0.3)
    _, last, other = changed_codes(wild)
    _, mean, means = changed_codes(replace(wild, average=0.8))
    assert mean < last and means != other
    # the mean is kept in place of what was trained: one that never leaves the start changes no code
    assert changed_codes(replace(GENTLE, average=1 - 1e-9))[0] == 0


def test_the_rates_rise_before_they_fall() -> None:
    # rates at which the first steps ruin the block: the loss comes back where they rise from zero
    hasty = replace(GENTLE, average=0.0, code_rate=3.0, scale_rate=0.3, norm_rate=0.3)
    _, at_once, _ = changed_codes(replace(hasty, warmup=0.0))
    _, risen, _ = changed_codes(replace(hasty, warmup=0.5))
    assert risen < at_once
    factors = rounding._schedule(8, 0.5)
    assert factors.tolist() == [1 / 4, 7 / 16, 9 / 16, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert torch.equal(rounding._schedule(4, 0.0), torch.tensor([1, 0.75, 0.5, 0.25]))


def test_the_metric_says_what_errors_cost_the_model() -> None:
    blocks, outer, tokens = small_model()
    config = config_of("llama")
    outer.head[:, 40:] = 0  # nothing reads these channels after the last block
    first, last = measure_sensitivity(blocks, outer, config, tokens, "cpu", 0, identity=0.1)
    error = torch.zeros(2, 128)
    error[0, :40], error[1, 40:80] = 1, 1
    cost = (error @ last).pow(2).sum(-1)
    assert float(cost[0]) > 5 * float(cost[1])
    again = measure_sensitivity(blocks, outer, config, tokens, "cpu", 0, identity=0.1)
    assert torch.equal(first, again[0])
    x = torch.nn.functional.embedding(tokens, outer.embedding)
    quant = QuantConfig(preset=best(LearnedRounding(steps=8)), group_size=32)
    with torch.no_grad():
        result = quantize_block(
            blocks[0], config, quant, Streams(x, x.clone()), "cpu", torch.float32, metric=first
        )
    assert result.streams is not None and bool(result.streams.quantized.isfinite().all())


def test_distillation_moves_scales_and_norms_alone_and_lowers_the_divergence() -> None:
    blocks, outer, tokens = small_model()
    config = config_of("llama")
    how = Distillation(scale_rate=0.02, norm_rate=0.02, tokens=128, window=64, swap=0.0, steps=30)
    recipe = replace(recipe_named("best"), distillation=how)
    quant = QuantConfig(preset=recipe, group_size=32, bits=2, distill=True)
    with torch.no_grad():
        rounded = [
            quantize_block(
                block, config, QuantConfig(preset="rtn", bits=2, group_size=32), None, "cpu", torch.float32
            ).weights
            for block in blocks
        ]
    done, final, report = distill(blocks, rounded, outer, config, quant, tokens, "cpu")
    assert report.kl_last < 0.9 * report.kl_first and final.dtype == torch.float16
    for before, after in zip(rounded, done, strict=True):
        for role, part in before.linears.items():
            new = after.linears[role].weight
            assert isinstance(part.weight, Quantized) and isinstance(new, Quantized)
            assert torch.equal(part.weight.codes, new.codes) and torch.equal(part.weight.zeros, new.zeros)
            assert not torch.equal(part.weight.scales, new.scales)
        assert not torch.equal(before.norms["attn_norm"], after.norms["attn_norm"])
    repeated, _, _ = distill(blocks, rounded, outer, config, quant, tokens, "cpu")
    first, second = repeated[0].linears["q"].weight, done[0].linears["q"].weight
    assert (
        isinstance(first, Quantized)
        and isinstance(second, Quantized)
        and torch.equal(first.scales, second.scales)
    )


def test_spliced_windows_hold_the_same_text_in_other_contexts() -> None:
    tokens = torch.arange(8 * 32).view(8, 32)
    windows = splice(tokens, 5, 100, swap=0.0, seed=0)
    assert windows.shape == (5, 100)
    neighbours = (windows[:, 1:] - windows[:, :-1]) == 1
    assert 0.8 < float(neighbours.float().mean()) < 1  # pieces, in order inside
    swapped = splice(tokens, 5, 100, swap=1.0, seed=0)
    assert int(swapped.min()) >= 0 and int(swapped.max()) < 256
    assert float(((swapped[:, 1:] - swapped[:, :-1]) == 1).float().mean()) < float(neighbours.float().mean())
    assert torch.equal(windows, splice(tokens, 5, 100, swap=0.0, seed=0))


def test_every_sample_is_used_once_before_any_is_used_again() -> None:
    order = batches(10, 4, 5, seed=0)
    assert sorted(order.flatten()[:10].tolist()) == list(range(10))
    assert torch.equal(order, batches(10, 4, 5, seed=0))


def test_adam_is_the_adam_of_torch() -> None:
    ours, theirs = torch.ones(5), torch.ones(5, requires_grad=True)
    optimizer = Adam([ours], [0.1], (0.9, 0.95))
    reference = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-20)
    for step in range(5):
        grad = torch.linspace(-1, 1, 5) * (step + 1) + 0.01
        theirs.grad = grad.clone()
        reference.step()
        optimizer.step([grad], torch.ones(1))
    torch.testing.assert_close(ours, theirs.detach())


def test_steps_run_as_often_as_asked() -> None:
    count = torch.zeros(1)
    runner = Steps(lambda: count.add_(1) and None, torch.device("cpu"))
    runner.run(3)
    runner.run(4)
    assert int(count) == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "quick"}, "expected one of rtn"),
        ({"bits": 5}, "bits is 5"),
        ({"group_size": 48}, "expected 32, 64 or 128"),
        ({"samples": 0}, "samples is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"kv_bits": 6}, "kv_bits is 6"),
        ({"preset": "rtn", "distill": True}, "distill needs calibration text"),
    ],
)
def test_a_configuration_is_checked_in_full_sentences(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        QuantConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"toward_float": 1.5}, "toward_float is 1.5"),
        ({"average": 1.0}, "average is 1.0"),
        ({"average": -0.5}, "average is -0.5"),
        ({"warmup": 1.0}, "warmup is 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LearnedRounding(**options)  # type: ignore[arg-type]


def test_a_frozen_block_of_biases_survives_training() -> None:
    config = config_of("internlm")
    block, x = block_of(config), stream_of(config, samples=8)
    quant = QuantConfig(preset=best(LearnedRounding(steps=4)), group_size=32)
    with torch.no_grad():
        result = quantize_block(block, config, quant, Streams(x, x.clone()), "cpu", torch.float32)
    part: LinearWeights = result.weights.linears["q"]
    assert part.bias is not None and block.linears["q"].bias is not None
    assert torch.equal(part.bias, block.linears["q"].bias.half())


@pytest.mark.parametrize("held", [True, False])
def test_attention_alone_must_have_a_repeatable_backward_pass(held: bool) -> None:
    """A warning leaves atomic sums in the backward pass of fused attention; strict mode everywhere would refuse other operations."""
    seen: list[tuple[str, bool]] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, name: str, value: torch.Tensor) -> torch.Tensor:
            ctx.name = name
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
            strict = torch.are_deterministic_algorithms_enabled()
            strict &= not torch.is_deterministic_algorithms_warn_only_enabled()
            seen.append((ctx.name, strict))
            return None, grads[0]

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return Probe.apply("attention", q + k * v).flatten(1)

    x = torch.ones(2, 1, 3, requires_grad=True)
    with repeatable() if held else nullcontext():
        before = Probe.apply("before", x)
        after = Probe.apply("after", training_attend(attend, torch.device("cuda"))(0, before, before, before))
        (grad,) = torch.autograd.grad((after * 2).sum(), [x])
    assert seen == [("after", False), ("attention", held), ("before", False)]
    assert torch.equal(grad, torch.full_like(x, 6.0))
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_mode_that_the_caller_has_set_is_left_as_it_was() -> None:
    x = torch.ones(2, 1, 3, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        attend = training_attend(lambda layer, q, k, v: (q + k * v).flatten(1), torch.device("cuda"))
        torch.autograd.grad(attend(0, x, x, x).sum(), [x])
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
