"""What the search of a run looks at, behind one interface: calibration text, saved statistics of it, or nothing.

S samples, L tokens a sample, H hidden size, Hkv key heads, D head size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from calib_data.blocks import CalibrationSet
from convert.errors import UsageError
from quant.block_task import BlockInputs, Streams
from quant.config import QuantConfig
from quant.kv.key_smoothing import Channels
from quant.recipes import names_on_statistics
from quant.session import Session
from quant.stage_clock import stage
from quant.statistics.calibrate import StatisticsFolder
from quant.statistics.streams import embed_tokens


@dataclass(frozen=True)
class BlockSource:
    """What is known before the search of one block: its inputs, and the ranges of K and V where they were saved.

    ranges: "k" and "v" -> minima and maxima (Hkv, D) of the float block; empty where text runs through it.
    """

    inputs: BlockInputs
    ranges: dict[str, Channels] = field(default_factory=dict)


class CalibrationSource(ABC):
    """Where the inputs of the blocks come from. `tokens` (S, L) int64 is the text itself, None where there is none."""

    tokens: Tensor | None = None
    warnings: tuple[str, ...] = ()

    @abstractmethod
    def facts(self) -> dict[str, Any] | None:
        """What the manifest says of it."""

    @abstractmethod
    def block(self, index: int, streams: Streams | None) -> BlockSource:
        """What is known before block `index`; `streams` are those that the block before it gave."""

    def start(
        self, session: Session, quant: QuantConfig, saved: dict[str, Tensor] | None = None
    ) -> Streams | None:
        """Hidden states (S, L, H) before the first block, or those saved before the block where a run goes on.

        Raises UsageError where the recipe cannot search on this source.
        """
        return None


class NoText(CalibrationSource):
    """For recipes that read nothing."""

    def facts(self) -> None:
        return None

    def block(self, index: int, streams: Streams | None) -> BlockSource:
        return BlockSource(None)


class TextSource(CalibrationSource):
    """Calibration text, whose hidden states go through the blocks as they are quantized."""

    def __init__(self, text: CalibrationSet) -> None:
        self.text, self.tokens, self.warnings = text, text.tokens, tuple(text.warnings)

    def facts(self) -> dict[str, Any]:
        return self.text.provenance

    def block(self, index: int, streams: Streams | None) -> BlockSource:
        return BlockSource(streams)

    def start(self, session: Session, quant: QuantConfig, saved: dict[str, Tensor] | None = None) -> Streams:
        both = quant.recipe.reads_float_stream
        if saved is not None:
            quantized = saved["quantized"].to(session.device)
            return Streams(saved["fp"].to(session.device) if both else quantized, quantized)
        with stage("embedding"):
            begin = embed_tokens(session.checkpoint, self.text.tokens, session.device, session.dtype)
        return Streams(begin.clone() if both else begin, begin)


class StatisticsSource(CalibrationSource):
    """Statistics that `quantize calibrate` has saved."""

    def __init__(self, folder: StatisticsFolder) -> None:
        self.folder = folder

    def facts(self) -> dict[str, Any]:
        return {"statistics": self.folder.digest, **self.folder.facts["calibration"]}

    def block(self, index: int, streams: Streams | None) -> BlockSource:
        saved = self.folder.block(index)
        return BlockSource(saved.inputs, dict(saved.ranges))

    def start(self, session: Session, quant: QuantConfig, saved: dict[str, Tensor] | None = None) -> None:
        check_statistics_use(quant)


def source_of(text: CalibrationSet | None) -> CalibrationSource:
    """The source of a run that has this text, or none."""
    return NoText() if text is None else TextSource(text)


def saved_streams(streams: Streams | None) -> dict[str, Tensor]:
    """What a run saves of its streams; `CalibrationSource.start` takes it back."""
    if streams is None:
        return {}
    if streams.fp is streams.quantized:
        return {"quantized": streams.quantized}
    return {"fp": streams.fp, "quantized": streams.quantized}


def check_statistics_use(quant: QuantConfig) -> None:
    """Raises UsageError where saved statistics are given to what needs the text itself, or reads nothing."""
    if quant.distill:
        raise UsageError(
            "--distill needs the calibration text, which --stats do not hold: leave out one of the two."
        )
    recipe = quant.recipe
    if recipe.text != "statistics":
        known = " or ".join(names_on_statistics())
        reason = "needs the calibration text itself" if recipe.text == "text" else "reads no text"
        raise UsageError(
            f"--stats goes with --preset {known} alone: {recipe.name} {reason}. Leave --stats out, or choose --preset {known}."
        )
