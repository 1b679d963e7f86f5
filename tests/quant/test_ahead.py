"""Learned rounding judged behind the blocks that follow: which blocks those are, what falls, what may not rise."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from convert.checkpoint import BlockWeights
from convert.readers import open_checkpoint
from kernels.int4 import Quantized
from quant import rounding
from quant.ahead import Ahead, EvenGradients, Upcoming
from quant.blocks import quantize_block
from quant.config import QuantConfig
from quant.parts import Parts
from quant.records import BlockResult, Streams
from quant.walk import first_streams, walk
from tests.quant.toy_blocks import block_of, config_of, stream_of
from tests.tiny_runs import write_runnable

CONFIG = config_of("llama")
GENTLE = rounding.Learning(code_rate=0.3, scale_rate=0.03, norm_rate=0.03)


def chain() -> list[BlockWeights]:
    return [replace(block_of(CONFIG, seed), index=seed) for seed in range(3)]


def streams() -> Streams:
    x = stream_of(CONFIG)
    return Streams(x, x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(7)))


def learned(how: rounding.Learning, ahead: Ahead | None, monkeypatch: pytest.MonkeyPatch) -> BlockResult:
    monkeypatch.setattr(rounding, "LEARNING", how)
    quant = QuantConfig(preset="best", group_size=32, bits=3, rounding_steps=40)
    with torch.no_grad():
        return quantize_block(chain()[0], CONFIG, quant, streams(), "cpu", torch.float32, ahead=ahead)


def error_behind(result: BlockResult, blocks: tuple[BlockWeights, ...], metric: torch.Tensor) -> float:
    assert result.streams is not None
    good, bad = result.streams.fp, result.streams.quantized
    parts = Parts(CONFIG, good)
    for block in blocks:
        good, bad = (parts.map(lambda h, b=block: parts.block(h, parts.dense(b)), s) for s in (good, bad))
    return float(((bad - good) @ metric).pow(2).mean())


def bytes_of(result: BlockResult) -> bytes:
    weights = [part.weight for part in result.weights.linears.values()]
    return b"".join(
        tensor.numpy().tobytes()
        for weight in weights
        if isinstance(weight, Quantized)
        for tensor in (weight.codes, weight.scales)
    )


def test_no_token_leads_the_steps() -> None:
    h = torch.zeros(1, 3, 2, requires_grad=True)
    given = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]]])  # 5, 1 and 0 long, 2 in the mean
    EvenGradients.apply(h, 1.5).backward(given)
    assert h.grad is not None
    torch.testing.assert_close(h.grad, torch.tensor([[[1.8, 2.4], [0.0, 1.0], [0.0, 0.0]]]))
    assert torch.equal(EvenGradients.apply(given, 1.0), given)


@pytest.mark.parametrize("depth", (1, 2))
def test_the_loss_behind_the_next_blocks_falls_further_than_the_plain_loss_takes_it(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = torch.diag(torch.linspace(0.2, 2, 128))
    ahead = Ahead(tuple(chain()[1 : 1 + depth]), metric)
    plain = learned(GENTLE, None, monkeypatch)
    deep = learned(GENTLE, ahead, monkeypatch)
    values = deep.reports[0].values
    assert values["ahead_after"] < 0.97 * values["ahead_before"]
    assert values["block_after"] <= values["block_before"]
    assert values["ahead_after"] == pytest.approx(error_behind(deep, ahead.blocks, metric), rel=1e-3)
    assert values["ahead_after"] < error_behind(plain, ahead.blocks, metric)
    assert all("rounding" in report.steps for report in deep.reports)
    assert "ahead_after" not in plain.reports[0].values
    assert bytes_of(learned(GENTLE, ahead, monkeypatch)) == bytes_of(deep) != bytes_of(plain)


def test_looking_ahead_goes_with_every_other_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = Ahead(tuple(chain()[1:]))
    most = replace(GENTLE, toward_float=0.5, drop=0.1, noise=0.1, average=0.5, pull=0.1, ahead_share=0.7)
    result = learned(most, ahead, monkeypatch)
    values = result.reports[0].values
    assert values["ahead_after"] < values["ahead_before"] and values["block_after"] < values["block_before"]
    assert bytes_of(learned(most, ahead, monkeypatch)) == bytes_of(result)
    held = learned(replace(most, hold=4), ahead, monkeypatch).reports[0].values
    assert held["ahead_before"] != values["ahead_before"] and held["ahead_after"] <= held["ahead_before"]


def test_a_share_of_the_plain_loss_and_nearer_aims_are_judged_behind_the_blocks_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ahead = Ahead((chain()[1],))
    deep = learned(GENTLE, ahead, monkeypatch)
    mixed = learned(replace(GENTLE, ahead_share=0.3), ahead, monkeypatch)
    assert bytes_of(mixed) != bytes_of(deep)
    assert mixed.reports[0].values["block_after"] < deep.reports[0].values["block_after"]
    own = learned(replace(GENTLE, toward_float=0.0), ahead, monkeypatch).reports[0].values
    assert own["ahead_after"] < own["ahead_before"] < deep.reports[0].values["ahead_before"]


def test_a_block_that_gets_worse_by_itself_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = torch.zeros(128, 128)
    metric[0, 0] = 1.0  # behind the next block one channel counts, so that the others are free to drift
    hasty = replace(GENTLE, code_rate=8.0, scale_rate=2.0, norm_rate=2.0)
    result = learned(hasty, Ahead((chain()[1],), metric), monkeypatch)
    values = result.reports[0].values
    assert values["block_after"] <= values["block_before"]
    assert values["ahead_after"] <= values["ahead_before"]


def test_the_walk_looks_as_far_ahead_as_there_are_blocks_and_reads_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = open_checkpoint(str(write_runnable(tmp_path / "model", layers=4)))
    read: list[int] = []
    block = ckpt.block

    def noted(index: int) -> BlockWeights:
        read.append(index)
        return block(index)

    monkeypatch.setattr(ckpt, "block", noted)
    metrics = [torch.full((1, 1), float(i)) for i in range(4)]
    upcoming = Upcoming(ckpt, 2, metrics)
    seen = []
    for index in range(4):
        assert upcoming.block(index).index == index
        after = upcoming.after(index)
        seen.append(
            after and ([one.index for one in after.blocks], after.metric is metrics[after.blocks[-1].index])
        )
        assert len(read) <= index + 3
    assert seen == [([1, 2], True), ([2, 3], True), ([3], True), None] and read == [0, 1, 2, 3]
    assert Upcoming(ckpt, 0, None).after(0) is None and Upcoming(ckpt, 9, None).after(2) is not None

    quant = QuantConfig(preset="best", group_size=32, rounding_steps=4, samples=8, seqlen=32)
    tokens = torch.randint(0, 200, (8, 32), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(rounding, "LEARNING", replace(GENTLE, ahead=9))
    with torch.no_grad():
        start = first_streams(ckpt, tokens, quant, torch.device("cpu"), torch.float32)
        steps = list(walk(ckpt, quant, start, torch.device("cpu"), torch.float32, tokens=tokens))
    values = [step.result.reports[0].values for step in steps]
    assert ["ahead_after" in found for found in values] == [True, True, True, False]
    assert all(found["block_after"] <= found["block_before"] for found in values)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ahead": -1}, "ahead is -1: expected 0 or more"),
        ({"ahead_share": 0.0}, "ahead_share is 0.0"),
        ({"ahead_share": 1.5}, "ahead_share is 1.5"),
        ({"ahead_limit": 0.0}, "ahead_limit is 0.0"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": 1.1}, "noise is 1.1: expected a share"),
        ({"average": 1.0}, "average is 1.0"),
        ({"average": -0.5}, "average is -0.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rounding.Learning(**options)  # type: ignore[arg-type]
