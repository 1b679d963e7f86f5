"""One decoder block quantized by the preset that is asked for. Pure: weights, streams and configuration in; weights, reports
and streams out. No I/O.

H hidden size, K in features.
"""

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights
from convert.config import ModelConfig
from convert.errors import InputError
from engine.model.block import Tap
from quant.config import QuantConfig
from quant.records import BlockResult, GramStatistics, Streams
from quant.search.awq_published import quantize_published
from quant.search.block_search import BlockSearch
from quant.search.rtn import round_block
from quant.search.statistics_walk import search_on_statistics
from quant.search.stored import check_block
from quant.search.stream_walk import search_on_streams


def quantize_block(
    weights: BlockWeights,
    config: ModelConfig,
    quant: QuantConfig,
    inputs: Streams | GramStatistics | None,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    tap: Tap | None = None,
    metric: Tensor | None = None,
) -> BlockResult:
    """Quantize the linears of one block.

    Args:
        inputs: hidden states before the block; statistics of the float stream for `fast` alone; None for `rtn`.
        dtype: of the forward passes; the search itself computes in float32.
        metric: (H, H), what errors of the block's output cost (`measure_sensitivity`); `best` alone reads it; None: the same.
        tap: sees "k" and "v" of the quantized block, for KV parameters.

    Returns linears as Quantized with folded norms, float16 throughout (a router and, with `keep_ragged`, linears whose K
    is no multiple of the group stay float), a report for each linear, and the streams after the block. Where a preset
    does not look at the float stream and both streams came in as one tensor, one tensor comes back.
    Raises InputError for weights or activations that are not finite and for K that is no multiple of the group.
    """
    check_block(weights, quant)
    if quant.preset == "rtn":
        return round_block(weights, config, quant, inputs, device, dtype, tap)
    search = BlockSearch(weights, config, quant, torch.device(device), dtype)
    if isinstance(inputs, GramStatistics):
        if quant.preset != "fast":
            raise InputError(
                f"The preset {quant.preset} needs the calibration text itself: only fast searches on statistics."
            )
        return search_on_statistics(search, inputs)
    if inputs is None:
        raise InputError(f"The preset {quant.preset} needs calibration text.")
    if quant.preset == "awq":
        return quantize_published(search.weights, config, quant, inputs, tap)
    return search_on_streams(search, inputs, tap, metric)
