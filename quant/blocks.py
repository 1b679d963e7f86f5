"""One decoder block quantized by the recipe that is asked for. Pure: weights, streams and configuration in; weights, reports
and streams out. No I/O.

H hidden size, K in features.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights
from convert.config import ModelConfig
from convert.errors import InputError
from convert.families.table import stays_float
from engine.model.block import Tap
from kernels.int4 import SCALE_MAX
from quant import recipes
from quant.block_states import FloatBlock
from quant.block_task import BlockInputs, BlockResult, BlockTask
from quant.config import QuantConfig
from quant.learn.rounding import learn_rounding
from quant.search.block_search import BlockSearch
from quant.search.from_statistics import search_on_statistics
from quant.search.sequential import search_on_streams
from quant.selection import config_of_block, is_quantized, is_skipped


def quantize_block(
    weights: BlockWeights,
    config: ModelConfig,
    quant: QuantConfig,
    inputs: BlockInputs,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    tap: Tap | None = None,
    metric: Tensor | None = None,
) -> BlockResult:
    """Quantize the linears of one block.

    Args:
        inputs: hidden states before the block; statistics of the float stream, for recipes that take them; None where the
            recipe reads no text.
        dtype: of the forward passes; the search itself computes in float32.
        metric: (H, H), what errors of the block's output cost (`measure_sensitivity`); learned rounding alone reads it;
            None: the same.
        tap: sees "k" and "v" of the quantized block, for KV parameters.

    Returns linears as Quantized with folded norms, float16 throughout (a router, what the recipe skips and, with
    `keep_ragged`, linears whose K is no multiple of the group stay float), a report for each linear, and the streams after the
    block. Where a recipe does not look at the float stream and both streams came in as one tensor, one tensor comes back.
    Raises InputError for weights or activations that are not finite, for K that is no multiple of the group, and for inputs
    that the recipe does not take.
    """
    block = check_block(weights, config, quant)
    recipe = quant.recipe
    if recipe.text != "none" and inputs is None:
        raise InputError(f"The preset {recipe.name} needs calibration text.")
    if isinstance(inputs, Mapping) and recipe.text == "text":
        known = ", ".join(recipes.names_on_statistics())
        raise InputError(
            f"The preset {recipe.name} needs the calibration text itself: of all presets, {known} searches on statistics."
        )
    quant = config_of_block(quant, config, weights.index)
    task = BlockTask(block, config, quant, inputs, torch.device(device), dtype, tap, metric)
    result: BlockResult = recipe.function()(task)
    return result


def solve_block(task: BlockTask) -> BlockResult:
    """The search of most recipes: the linears one after another by the solver's steps, on streams or saved statistics; then
    learned rounding, where the recipe has it and the float stream is there.
    """
    search = BlockSearch(task)
    if isinstance(task.inputs, Mapping):
        return search_on_statistics(search, task.inputs)
    if task.inputs is None:
        raise InputError(f"The preset {task.quant.recipe.name} needs calibration text.")
    learning = task.quant.recipe.learning if task.inputs.fp is not task.inputs.quantized else None
    result = search_on_streams(search, task.inputs, task.tap if learning is None else None)
    if learning is None:
        return result
    return learn_rounding(task, result, learning, search.source, search.free_codes)


def check_block(block: BlockWeights, config: ModelConfig, quant: QuantConfig) -> FloatBlock:
    """The block as one that can be quantized.

    Raises InputError for weights that are not finite, beyond the format or quantized already, and for K that is no multiple of the group.
    """
    found = FloatBlock.of(block)
    for role, part in found.linears.items():
        bad = int((~part.weight.isfinite()).sum())
        if bad:
            raise InputError(
                f"Block {block.index}, {role}: {bad} weights are NaN or infinite. The checkpoint is damaged."
            )
        limit = SCALE_MAX * (2**quant.bits - 1)
        beyond = int((part.weight.abs() > limit).sum())
        if beyond and is_quantized(config, quant, block.index, role):
            raise InputError(
                f"Block {block.index}, {role}: {beyond} weights lie beyond {limit:,.0f}, the largest that {quant.bits} bits and a float16 scale "
                "hold: they would be stored as something else. The checkpoint is damaged or its training diverged."
            )
        if quant.keep_ragged or stays_float(role) or is_quantized(config, quant, block.index, role):
            continue
        if not is_skipped(config, quant, block.index, role):
            raise InputError(
                f"Block {block.index}, {role}: K = {part.weight.shape[1]} is no multiple of the group size {quant.group_size}. "
                "Choose a smaller --group-size, --pad for exact zero-padding, or --keep-ragged to leave it in float16."
            )
    return found
