"""The blocks of a model through the search one after another, with the ranges of K and V. No files: run and table use it.

S samples, L tokens a sample, H hidden size, Hkv key heads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint
from quant.block_task import BlockResult, LinearReport, Streams, dead_channels
from quant.blocks import quantize_block
from quant.config import QuantConfig
from quant.kv.key_smoothing import key_channels, key_factors, smooth_channels, smooth_keys
from quant.kv.parameters import folded_ranges
from quant.learn.distill import Keeper, distill
from quant.learn.model_forward import OuterWeights
from quant.learn.sensitivity import fits_whole, measure_sensitivity
from quant.stage_clock import stage
from quant.statistics.block import BlockStatistics, SavedStatistics
from quant.statistics.calibrate import StatisticsFolder
from quant.statistics.chunks import ChunkMemory
from quant.statistics.streams import advance, embed_tokens

HeadRanges = dict[str, tuple[Tensor, Tensor]]  # "k" and "v" -> minima and maxima (Hkv,), after RoPE


@dataclass(frozen=True)
class Step:
    """One block done. `ranges` and `key_factors` are None where no text ran through it; `padding` are the zero columns that
    `--pad` added.
    """

    index: int
    result: BlockResult
    ranges: HeadRanges | None
    padding: dict[str, int] = field(default_factory=dict)
    key_factors: tuple[float, float] | None = None  # smallest and largest of those moved from K into Q
    notes: tuple[str, ...] = ()  # what the run should say beside the warnings of the linears

    @property
    def warnings(self) -> list[str]:
        """The warnings of its linears, by layer name; the dead channels of padding are no news."""
        roles: dict[str, list[str]] = {}
        for report in self.result.reports:
            for warning in report.warnings:
                if warning != dead_channels(self.padding.get(report.role, -1)):
                    roles.setdefault(warning, []).append(report.role)
        found = [f"layer {self.index}, {', '.join(names)}: {warning}" for warning, names in roles.items()]
        return [*self.notes, *found]


def padding_of(weights: BlockWeights) -> dict[str, int]:
    """Role -> columns that are zero throughout."""
    return {
        role: int((part.weight == 0).all(0).sum())
        for role, part in weights.linears.items()
        if isinstance(part.weight, Tensor)
    }


def first_streams(
    ckpt: Checkpoint, tokens: Tensor, quant: QuantConfig, device: torch.device, dtype: torch.dtype
) -> Streams:
    """Hidden states before the first block; two streams only where the preset looks at both."""
    with stage("embedding"):
        start = embed_tokens(ckpt, tokens, device, dtype)
    return Streams(start.clone() if quant.recipe.reads_float_stream else start, start)


def walk(
    ckpt: Checkpoint,
    quant: QuantConfig,
    source: Streams | StatisticsFolder | None,
    device: torch.device,
    dtype: torch.dtype,
    first: int = 0,
    tokens: Tensor | None = None,
) -> Iterator[Step]:
    """Quantize the blocks from `first` on. `source`: streams before that block, saved statistics, or None (`rtn`).

    With a quantized KV cache (`quant.kv_bits`), the channels of K are made alike before the search of a block.

    tokens: (S, L), the calibration text; from it `best` learns what errors cost, where the model fits on the device.

    Raises ResourceError when the device runs out of memory, with the numbers.
    """
    streams = source if isinstance(source, Streams) else None
    metrics = error_metrics(ckpt, quant, tokens, device)
    memory = ChunkMemory(device, None if streams is None else streams.quantized.shape[1])

    def search(
        weights: BlockWeights, saved: SavedStatistics | None, metric: Tensor | None
    ) -> tuple[BlockResult, HeadRanges | None, tuple[float, float] | None]:
        inputs = saved.inputs if saved else streams
        channels = dict(saved.ranges) if saved else {}
        moved = None
        if quant.kv_bits != 16 and inputs is not None:
            if isinstance(inputs, Streams):
                channels["k"] = key_channels(weights, ckpt.config, inputs.fp)
            factors = key_factors(weights, ckpt.config, channels["k"])
            weights = smooth_keys(weights, ckpt.config, factors)
            channels["k"] = smooth_channels(channels["k"], factors)
            moved = float(factors.min()), float(factors.max())
        seen = BlockStatistics(weights.index)
        tap = seen.tap_ranges if isinstance(inputs, Streams) else None
        result = quantize_block(weights, ckpt.config, quant, inputs, device, dtype, tap=tap, metric=metric)
        if saved is not None:
            return result, folded_ranges(channels, weights, result.weights), moved
        ranges = {name: (low.cpu(), high.cpu()) for name, (low, high) in seen.head_ranges().items()}
        return result, ranges or None, moved

    for index in range(first, ckpt.config.num_layers):
        with stage("read weights"):
            weights = ckpt.block(index)
        saved = source.block(index) if isinstance(source, StatisticsFolder) else None
        step = partial(search, weights, saved, metrics[index] if metrics else None)
        (result, ranges, moved), note = memory.run(step, f"layer {index}")
        streams = result.streams
        padding = padding_of(weights) if ckpt.config.padded_from is not None else {}
        yield Step(index, result, ranges, padding, moved, (note,) if note else ())


def error_metrics(
    ckpt: Checkpoint, quant: QuantConfig, tokens: Tensor | None, device: torch.device
) -> list[Tensor] | None:
    """What errors at the output of each block cost the model, for presets that learn rounding and models that fit."""
    learning = quant.recipe.learning
    if tokens is None or learning is None or not fits_whole(ckpt.config, device):
        return None
    source = [ckpt.block(index) for index in range(ckpt.config.num_layers)]
    identity = learning.metric_identity
    return measure_sensitivity(
        source, OuterWeights.of(ckpt), ckpt.config, tokens, device, quant.seed, identity
    )


def range_record(ranges: HeadRanges) -> dict[str, list[list[float]]]:
    """Ranges as JSON; float32 values survive exactly."""
    return {name: [low.float().tolist(), high.float().tolist()] for name, (low, high) in ranges.items()}


def ranges_of(record: dict[str, list[list[float]]]) -> HeadRanges:
    """Inverse of `range_record`."""
    return {name: (torch.tensor(low), torch.tensor(high)) for name, (low, high) in record.items()}


def report_record(report: LinearReport, index: int) -> dict[str, object]:
    """A report as JSON for the manifest; a number that is not finite becomes null."""
    record = report.to_json()
    for key, value in record.items():
        if isinstance(value, float) and not torch.isfinite(torch.tensor(value)):
            record[key] = None
    record["values"] = {k: v for k, v in report.values.items() if v == v and abs(v) != float("inf")}
    return {"layer": index, **record}


def distill_blocks(
    ckpt: Checkpoint,
    blocks: Sequence[BlockWeights],
    quant: QuantConfig,
    tokens: Tensor,
    device: torch.device,
    keeper: Keeper | None = None,
) -> tuple[list[BlockWeights], Tensor, dict[str, float]]:
    """The end-to-end pass over quantized blocks: blocks, final norm (H,), and its KL before and after on the text."""

    source = [ckpt.block(index) for index in range(ckpt.config.num_layers)]
    done, norm, report = distill(
        source, blocks, OuterWeights.of(ckpt), ckpt.config, quant, tokens, device, keeper
    )
    return list(done), norm, {"kl_first": report.kl_first, "kl_last": report.kl_last}


def measure_ranges(
    ckpt: Checkpoint, blocks: Sequence[BlockWeights], tokens: Tensor, device: torch.device, dtype: torch.dtype
) -> list[HeadRanges]:
    """Ranges of K and V of finished blocks on the text, by one more pass."""
    stream = embed_tokens(ckpt, tokens, device, dtype)
    found: list[HeadRanges] = []
    for block in blocks:
        seen = BlockStatistics(block.index)
        stream = advance(stream, block, ckpt.config, dtype, seen.tap_ranges)
        found.append({name: (low.cpu(), high.cpu()) for name, (low, high) in seen.head_ranges().items()})
    return found
