"""One block rounded to nearest: no search, no text."""

from dataclasses import replace

import torch

from convert.checkpoint import BlockWeights
from convert.config import ModelConfig
from engine.model.block import Tap
from kernels.int4 import Quantized, quantize
from quant.config import QuantConfig
from quant.records import BlockResult, GramStatistics, LinearReport, Streams
from quant.search.stored import is_quantized, to_float16
from quant.statistics.parts import Parts


def round_block(
    weights: BlockWeights,
    config: ModelConfig,
    quant: QuantConfig,
    inputs: Streams | GramStatistics | None,
    device: torch.device | str,
    dtype: torch.dtype,
    tap: Tap | None,
) -> BlockResult:
    """Every linear rounded to nearest; streams, where there are any, move on through the result."""
    linears, reports = dict(weights.linears), []
    for role, part in weights.linears.items():
        if not is_quantized(weights, role, quant) or isinstance(part.weight, Quantized):
            continue
        weight = part.weight.to(device).float()
        quantized = quantize(weight, quant.bits, quant.group_size)
        linears[role] = replace(part, weight=quantized)
        loss = float((quantized.dequantize() - weight).double().pow(2).sum())  # inputs of unit covariance
        reports.append(LinearReport(role, quantized.shape, loss, loss, loss))
    done = to_float16(replace(weights, linears=linears))
    streams = None
    if isinstance(inputs, Streams):
        parts = Parts(config, inputs.quantized)
        dense, source = parts.dense(done), parts.dense(weights)
        out = parts.map(lambda x: parts.block(x, dense, tap), inputs.quantized)
        apart = inputs.fp is not inputs.quantized  # the float stream is only computed where it was kept apart
        streams = Streams(parts.map(lambda x: parts.block(x, source), inputs.fp) if apart else out, out)
    return BlockResult(done, tuple(reports), streams)
