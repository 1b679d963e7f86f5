"""Every variant of a block through every preset: finite, no linear above rounding, `default` nearer to the float block than `rtn`."""

import pytest
import torch
from toy_blocks import SHAPES, block_of, config_of, stream_of

from quant.block_task import Streams
from quant.blocks import quantize_block
from quant.config import QuantConfig
from quant.statistics.chunked_block import ChunkedBlock

NEWER = [name for name in SHAPES if name not in ("llama", "qwen2", "qwen3", "internlm")]


@pytest.mark.parametrize("family", NEWER)
def test_default_is_nearer_to_the_float_block_than_rounding(family: str) -> None:
    config = config_of(family)
    block, x = block_of(config), stream_of(config, samples=16)
    x[..., 7] *= 20
    chunked = ChunkedBlock(config, x)
    wanted = chunked.map(lambda part: chunked.block(part, chunked.dense(block)), x)
    errors = {}
    for preset in ("rtn", "awq", "fast", "default"):
        streams = Streams(x.clone(), x)
        quant = QuantConfig(preset=preset, group_size=32)
        with torch.no_grad():
            done = quantize_block(block, config, quant, streams, "cpu", torch.float32)
        assert done.streams is not None
        assert all(bool(report.loss_after <= report.loss_rtn * (1 + 1e-6) + 1e-30) for report in done.reports)
        # what the engine makes of the packed block is the stream that the search handed on; where two experts are equally
        # likely, float16 may choose the other one: the median of the tokens
        dense = chunked.dense(done.weights)
        out = chunked.map(lambda part, dense=dense: chunked.block(part, dense), x)
        apart = (out - done.streams.quantized).norm(dim=-1) / out.norm(dim=-1)
        assert float(apart.median()) < 1e-3, preset
        errors[preset] = float((out - wanted).norm() / (wanted - x).norm())
    assert errors["default"] < errors["rtn"], errors
    assert errors["fast"] < errors["rtn"], errors
