"""Folding leaves what a block computes unchanged; scales are such that it can."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_blocks import SHAPES, block_of, config_of, stream_of

from convert.families.table import scale_groups
from kernels.int4 import quantize
from quant.search.scales.folding import fold_norm, fold_rows, kv_fold, norm_fold, row_fold, snap_to_norm
from quant.statistics.chunked_block import ChunkedBlock


@pytest.mark.parametrize("family", SHAPES)
def test_folding_leaves_the_float32_output_unchanged(family: str) -> None:
    """Every pair of `scale_groups`, scales up to 20 to one side, channels of the stream and of the norms 50 times the others."""
    config = config_of(family)
    block, x = block_of(config), stream_of(config, samples=4)
    x[..., 7] *= 50
    generator = torch.Generator().manual_seed(7)
    linears = dict(block.linears)
    norms = {role: norm.clone() for role, norm in block.norms.items()}
    for norm in norms.values():
        norm[5] *= 50
    block = replace(block, norms=dict(norms))

    def weight(role: str) -> torch.Tensor:
        found = linears[role].weight
        assert isinstance(found, torch.Tensor)
        return found

    for before, readers in scale_groups(config):
        if before in norms:
            fold = norm_fold(norms[before], config.norm_offset)
        else:
            fold = kv_fold(weight(before), config) if before == "v" else row_fold(weight(before))
        channels = fold.shrink(torch.ones(weight(readers[0]).shape[1]))
        scale = fold.snap(torch.exp(torch.randn(channels.shape, generator=generator)))
        assert float((scale != 1).float().mean()) > 0.9  # or nothing was folded
        for role in readers:
            linears[role] = replace(linears[role], weight=weight(role) * fold.spread(scale))
        if before in norms:
            norms[before] = fold_norm(norms[before], scale, config.norm_offset).float()
        else:
            linears[before] = fold_rows(linears[before], scale)
    folded = replace(block, linears=linears, norms=norms)
    chunked = ChunkedBlock(config, x)
    out, wanted = chunked.block(x, chunked.dense(folded)), chunked.block(x, chunked.dense(block))
    assert float((out - wanted).norm() / wanted.norm()) < 1e-5


@given(st.integers(0, 2**32 - 1), st.floats(-4, 4))
@settings(max_examples=50, deadline=None)
def test_a_snapped_scale_divides_the_norm_exactly_in_fp16(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm = torch.randn(64, generator=generator).half().float()
    norm[:3] = torch.tensor([0.0, 2.0**-24, 60000.0])
    scale = torch.exp(spread * torch.randn(64, generator=generator)).clamp(1 / 64, 64)
    snapped = snap_to_norm(scale, norm)
    assert bool((snapped > 0).all()) and bool(snapped.isfinite().all())
    folded = fold_norm(norm, snapped).float()
    # weight * snapped undoes the fold to float32's last bit
    torch.testing.assert_close(folded * snapped, norm, rtol=3e-7, atol=0)
    moved = (snapped / scale - 1).abs()
    assert bool((moved[snapped != 1] < 2**-10).all())


def test_a_quantized_weight_keeps_its_integers_when_rows_are_scaled() -> None:
    config = config_of("qwen2")
    part = block_of(config).linears["v"]
    assert isinstance(part.weight, torch.Tensor)
    weight = part.weight.clone()
    weight[4] = 0
    quantized = replace(part, weight=quantize(weight, 4, 32))
    scale = torch.linspace(0.3, 3, 64)
    folded = fold_rows(quantized, scale)
    assert not isinstance(folded.weight, torch.Tensor) and not isinstance(quantized.weight, torch.Tensor)
    assert torch.equal(folded.weight.codes, quantized.weight.codes)
    torch.testing.assert_close(
        folded.weight.dequantize(), quantized.weight.dequantize() / scale[:, None], rtol=2**-10, atol=1e-7
    )
    assert folded.bias is not None and part.bias is not None
    torch.testing.assert_close(folded.bias, part.bias / scale)


def test_query_heads_share_the_scale_of_their_kv_head() -> None:
    config = config_of("llama")  # 4 heads, 2 KV heads of size 32
    fold = kv_fold(torch.ones(64, 128), config)
    columns = fold.spread(torch.arange(64.0))
    assert torch.equal(columns.view(4, 32)[0], columns.view(4, 32)[1])
    assert torch.equal(columns.view(4, 32)[2], torch.arange(32.0, 64.0))
    assert torch.equal(fold.shrink(columns), torch.arange(64.0))


def test_rows_too_small_for_fp16_are_not_scaled() -> None:
    weight = torch.full((3, 8), 1e-4)
    weight[1] = 1.0
    assert torch.equal(row_fold(weight).snap(torch.full((3,), 8.0)), torch.tensor([1.0, 8.0, 1.0]))
