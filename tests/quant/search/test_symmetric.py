"""The symmetric grid: its definition by hand, in every preset every zero point is 8, and no linear loses more than by rounding."""

from pathlib import Path

import pytest
import torch
from tiny_runs import FAST, run, write_runnable, write_text

from convert.folder.state import read_manifest
from convert.pack.plan import is_symmetric_model
from convert.readers import open_checkpoint
from kernels.int4 import Quantized, qparams, quantize
from kernels.search.clip import choose_ranges
from quant.recipes import names


def test_scale_by_hand() -> None:
    """Range [-4.25, 3]: 4.25 / 8.5 = 0.5 is above 3 / 7.5 = 0.4. Range [-1, 3]: 3 / 7.5 = 0.4."""
    scale, zero = qparams(torch.tensor([-4.25, -1.0]), torch.tensor([3.0, 3.0]), 4, symmetric=True)
    assert scale.tolist() == [0.5, float(torch.tensor(0.4).half())]
    assert zero.tolist() == [8.0, 8.0]
    assert qparams(torch.tensor([-1.0]), torch.tensor([1.0]), 3, symmetric=True)[1].tolist() == [4.0]


def test_no_weight_is_more_than_half_a_step_off() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    made = quantize(weight, 4, 32, symmetric=True)
    steps = made.scales.float().repeat_interleave(32, dim=1)
    assert (
        float(((made.dequantize() - weight).abs() / steps).max()) <= 0.5 * 1.01
    )  # fp16 scales: 2^-11 of 7.5 steps
    assert bool((made.zeros == 8).all())
    finer = Quantized(made.codes, (made.scales * 0.97).half(), made.zeros, 32)
    reached = (
        (weight / (finer.scales.float().repeat_interleave(32, dim=1))).abs().unflatten(1, (-1, 32)).amax(-1)
    )
    assert bool((reached > 7.5).all())  # at any finer scale some weight of each group leaves the codes


def test_groups_of_zeros_are_zero() -> None:
    made = quantize(torch.zeros(8, 64), 4, 32, symmetric=True)
    assert bool((made.codes == 8).all()) and bool((made.dequantize() == 0).all())


@pytest.mark.parametrize("preset", names())
def test_every_preset_keeps_the_zero_point(preset: str, tmp_path: Path) -> None:
    write_runnable(tmp_path / "model", layers=1)
    write_text(tmp_path / "text.txt")
    text = () if preset == "rtn" else ("--calib-data", tmp_path / "text.txt", *FAST[2:-2])
    options = ("--preset", preset, *FAST[:2], *FAST[-2:], *text)
    done = run("quantize", "awq", tmp_path / "model", "-o", tmp_path / "s", "--symmetric", *options)
    assert done.returncode == 0, done.stderr
    ckpt = open_checkpoint(tmp_path / "s")
    assert is_symmetric_model(ckpt)
    facts = read_manifest(tmp_path / "s").data
    assert facts["config"]["symmetric"] is True
    for linear in ckpt.block(0).linears.values():
        weight = linear.weight
        assert isinstance(weight, Quantized)
        used = weight.codes.unique().tolist()
        assert min(used) <= 1 and max(used) >= 14  # both ends of the codes are used
    if preset not in ("rtn", "gptq"):  # gptq as published may lose more than rounding
        assert not facts["standing_out"]


def test_the_range_of_a_group_is_judged_on_the_symmetric_grid() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 64, generator=generator)
    x = torch.randn(200, 64, generator=generator)
    gram = x.t() @ x / 200
    blocks = torch.stack([gram[:32, :32], gram[32:, 32:]])
    pairs = torch.cartesian_prod(torch.tensor([1.0, 0.8, 0.6]), torch.tensor([1.0, 0.8, 0.6]))
    scales = torch.ones(1, 64)
    index, loss = choose_ranges(weight, scales, blocks, pairs, 4, symmetric=True)
    for row in range(8):  # the loss that is given is that of the chosen range
        for group in range(2):
            w = weight[row, 32 * group : 32 * group + 32]
            low, high = pairs[index[0, row, group]]
            scale, _ = qparams(w.min() * low, w.max() * high, 4, symmetric=True)
            d = (w / scale).round().clamp(-8, 7) * scale - w
            assert float(loss[0, row, group]) == pytest.approx(float(d @ blocks[group] @ d), rel=1e-4)
