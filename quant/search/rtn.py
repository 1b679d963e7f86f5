"""One block rounded to nearest: no search, no text."""

from dataclasses import replace

from kernels.int4 import Quantized, quantize
from quant.records import BlockResult, BlockTask, LinearReport, Streams
from quant.search.stored import to_float16
from quant.selection import is_quantized
from quant.statistics.parts import Parts


def round_block(task: BlockTask) -> BlockResult:
    """Every linear rounded to nearest; streams, where there are any, move on through the result."""
    weights, quant, inputs = task.weights, task.quant, task.inputs
    linears, reports = dict(weights.linears), []
    for role, part in weights.linears.items():
        is_chosen = is_quantized(task.config, quant, weights.index, role)
        if not is_chosen or isinstance(part.weight, Quantized):
            continue
        weight = part.weight.to(task.device).float()
        quantized = quantize(weight, quant.bits, quant.group_size)
        linears[role] = replace(part, weight=quantized)
        loss = float((quantized.dequantize() - weight).double().pow(2).sum())  # inputs of unit covariance
        reports.append(LinearReport(role, quantized.shape, loss, loss, loss))
    done = to_float16(replace(weights, linears=linears))
    streams = None
    if isinstance(inputs, Streams):
        parts = Parts(task.config, inputs.quantized)
        dense, source = parts.dense(done), parts.dense(weights)
        out = parts.map(lambda x: parts.block(x, dense, task.tap), inputs.quantized)
        apart = inputs.fp is not inputs.quantized  # the float stream is only computed where it was kept apart
        streams = Streams(parts.map(lambda x: parts.block(x, source), inputs.fp) if apart else out, out)
    return BlockResult(done, tuple(reports), streams)
