"""The blocks of a model through the search one after another, with the ranges of K and V. No files: run and table use it.

S samples, L tokens a sample, H hidden size, Hkv key heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from convert.checkpoint import BlockWeights
from quant.block_task import BlockResult, Streams, dead_channels
from quant.blocks import quantize_block
from quant.config import QuantConfig
from quant.kv.key_smoothing import key_channels, key_factors, smooth_channels, smooth_keys
from quant.kv.parameters import folded_ranges
from quant.learn.model_forward import OuterWeights
from quant.learn.sensitivity import fits_whole, measure_sensitivity
from quant.read_ahead import blocks_from
from quant.session import Session
from quant.state.block_record import HeadRanges, range_record, report_record
from quant.statistics.block import BlockStatistics
from quant.statistics.chunks import ChunkMemory
from quant.text.sources import BlockSource, CalibrationSource


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

    def record(self) -> dict[str, object]:
        """What a run keeps of the block, as JSON."""
        return {
            "reports": [report_record(report, self.index) for report in self.result.reports],
            "warnings": self.warnings,
            "ranges": None if self.ranges is None else range_record(self.ranges),
            "key_factors": self.key_factors,
        }


def walk(
    session: Session,
    quant: QuantConfig,
    source: CalibrationSource,
    first: int = 0,
    saved: dict[str, Tensor] | None = None,
) -> Iterator[Step]:
    """Quantize the blocks from `first` on; `saved` are the streams before that block, as `saved_streams` gives them.

    With a quantized KV cache (`quant.kv_bits`), the channels of K are made alike before the search of a block. Recipes that learn
    rounding learn from the text what errors cost, where the model fits on the device.

    Raises ResourceError when the device runs out of memory, with the numbers.
    """
    layers = session.config.num_layers
    if first == layers:
        return
    streams = source.start(session, quant, saved)
    metrics = error_metrics(session, quant, source.tokens)
    memory = ChunkMemory(session.device, None if streams is None else streams.quantized.shape[1])
    for weights in blocks_from(session.checkpoint, first, session.device):
        index = weights.index
        given = source.block(index, streams)
        task = partial(quantize_step, session, quant, weights, given, metrics[index] if metrics else None)
        step, note = memory.run(task, f"layer {index}")
        streams = step.result.streams
        yield replace(step, notes=(note,)) if note else step


def quantize_step(
    session: Session, quant: QuantConfig, weights: BlockWeights, given: BlockSource, metric: Tensor | None
) -> Step:
    """One block: keys made alike where the cache is quantized, the search, the ranges of K and V after it.

    metric: (H, H), what errors at the block's output cost; None: the same everywhere.
    """
    padding = _padding_of(weights) if session.config.padded_from is not None else {}
    moved = None
    if quant.kv_bits != 16 and given.inputs is not None:
        weights, given, moved = _smoothed(session, weights, given)
    seen = BlockStatistics(weights.index)
    # with a float cache nobody asks for ranges, and a pass is saved
    tap = seen.tap_ranges if isinstance(given.inputs, Streams) and quant.kv_bits != 16 else None
    result = quantize_block(
        weights,
        session.config,
        quant,
        given.inputs,
        session.device,
        session.dtype,
        tap=tap,
        metric=metric,
    )
    if given.ranges:
        ranges = folded_ranges(given.ranges, weights, result.weights)
    else:
        ranges = {name: (low.cpu(), high.cpu()) for name, (low, high) in seen.head_ranges().items()}
    return Step(weights.index, result, ranges or None, padding, moved)


def error_metrics(session: Session, quant: QuantConfig, tokens: Tensor | None) -> list[Tensor] | None:
    """What errors at the output of each block cost the model, (H, H) each.

    None for recipes that learn no rounding, without text, and for models that do not fit on the device.
    """
    learning, config = quant.recipe.learning, session.config
    if tokens is None or learning is None or not fits_whole(config, session.device):
        return None
    ckpt = session.checkpoint
    source = [ckpt.block(index) for index in range(config.num_layers)]
    outer = OuterWeights.of(ckpt)
    return measure_sensitivity(
        source, outer, config, tokens, session.device, quant.seed, learning.metric_identity
    )


def _smoothed(
    session: Session, weights: BlockWeights, given: BlockSource
) -> tuple[BlockWeights, BlockSource, tuple[float, float]]:
    """The block with K's channels alike, its ranges where they were saved, and the smallest and largest factor."""
    config = session.config
    if isinstance(given.inputs, Streams):
        channels = key_channels(weights, config, given.inputs.fp)
    else:
        channels = given.ranges["k"]
    factors = key_factors(weights, config, channels)
    if given.ranges:
        given = replace(given, ranges={**given.ranges, "k": smooth_channels(channels, factors)})
    return smooth_keys(weights, config, factors), given, (float(factors.min()), float(factors.max()))


def _padding_of(weights: BlockWeights) -> dict[str, int]:
    """Role -> columns that are zero throughout."""
    return {
        role: int((part.weight == 0).all(0).sum())
        for role, part in weights.linears.items()
        if isinstance(part.weight, Tensor)
    }
