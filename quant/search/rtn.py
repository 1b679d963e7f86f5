"""One block rounded to nearest: no search, no text."""

from convert.checkpoint import BlockWeights, LinearWeights
from kernels.int4 import quantize
from quant.block_states import QuantizedBlock
from quant.block_task import BlockResult, BlockTask, LinearReport, Streams
from quant.selection import is_quantized
from quant.statistics.chunked_block import ChunkedBlock


def round_block(task: BlockTask) -> BlockResult:
    """Every linear rounded to nearest; streams, where there are any, move on through the result."""
    weights, quant, inputs = task.weights, task.quant, task.inputs
    linears: dict[str, LinearWeights] = dict(weights.linears)
    reports = []
    for role, part in weights.linears.items():
        if not is_quantized(task.config, quant, weights.index, role):
            continue
        weight = part.weight.to(task.device).float()
        quantized = quantize(weight, quant.bits, quant.group_size, quant.symmetric)
        linears[role] = LinearWeights(
            quantized.to(part.weight.device), part.bias
        )  # one at a time is on the device
        loss = float((quantized.dequantize() - weight).double().pow(2).sum())  # inputs of unit covariance
        reports.append(LinearReport(role, quantized.shape, loss, loss, loss))
    done = QuantizedBlock.of(
        BlockWeights(weights.index, linears, weights.norms, weights.vectors, weights.norm_offset)
    )
    streams = None
    if isinstance(inputs, Streams):
        chunked = ChunkedBlock(task.config, inputs.quantized)
        dense, source = chunked.dense(done), chunked.dense(weights)
        out = chunked.map(lambda x: chunked.block(x, dense, task.tap), inputs.quantized)
        apart = inputs.fp is not inputs.quantized  # the float stream is only computed where it was kept apart
        streams = Streams(chunked.map(lambda x: chunked.block(x, source), inputs.fp) if apart else out, out)
    return BlockResult(done, tuple(reports), streams)
