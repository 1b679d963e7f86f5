"""A whole model quantized in memory: its blocks, the end-to-end pass over them, and a checkpoint to judge it by.

S samples, L tokens a sample, H hidden size, Hkv key heads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint
from convert.checkpoint_view import CheckpointView, WithFinalNorm
from convert.config import QuantFormat
from quant.config import QuantConfig
from quant.learn.distill import Keeper, distill
from quant.learn.model_forward import OuterWeights
from quant.session import Session
from quant.state.block_record import HeadRanges
from quant.statistics.block import BlockStatistics
from quant.statistics.streams import advance, embed_tokens
from quant.text.sources import CalibrationSource
from quant.walk import Step, walk


@dataclass(frozen=True)
class QuantizedModel:
    """The blocks of a model, quantized.

    final_norm: (H,) where an end-to-end pass has trained it. ranges: of K and V by block, where text ran through all of them.
    divergence: KL from the float model at the begin and end of the pass, as `kl_first` and `kl_last`.
    """

    blocks: Sequence[BlockWeights]
    ranges: list[HeadRanges] | None
    final_norm: Tensor | None = None
    divergence: dict[str, float] | None = None

    def outside(self, source: Checkpoint) -> Checkpoint:
        """The source with what the pass changed outside the blocks."""
        return source if self.final_norm is None else WithFinalNorm(source, self.final_norm)

    def checkpoint(self, source: Checkpoint, quant: QuantConfig) -> Checkpoint:
        """The model as a checkpoint, to be run."""
        return _QuantizedCheckpoint(
            self.outside(source), self.blocks, QuantFormat(quant.bits, quant.group_size)
        )


class _QuantizedCheckpoint(CheckpointView):
    """A checkpoint whose blocks were just quantized; the rest is its source's, in float16 as a packed checkpoint holds it."""

    def __init__(self, inner: Checkpoint, blocks: Sequence[BlockWeights], fmt: QuantFormat) -> None:
        super().__init__(inner, kind="awq", config=replace(inner.config, quantization=fmt))
        self._blocks = blocks

    def block(self, index: int) -> BlockWeights:
        return self._blocks[index]

    def embedding(self) -> Tensor:
        return self.inner.embedding().half()

    def final_norm(self) -> Tensor:
        return self.inner.final_norm().half()

    def lm_head(self) -> Tensor:
        return self.inner.lm_head().half()


def quantize_in_memory(session: Session, quant: QuantConfig, source: CalibrationSource) -> QuantizedModel:
    """All blocks, and the end-to-end pass where the configuration asks for it.

    With `quant.kv_bits` 8 it is the model that `quantize awq --kv-bits 8` writes.
    """
    found = collect(walk(session, quant, source))
    return end_to_end(session, quant, found.blocks, source) if quant.distill else found


def collect(steps: Iterable[Step]) -> QuantizedModel:
    """The blocks of a walk."""
    done = [(step.result.weights, step.ranges) for step in steps]
    ranges = [part for _, part in done if part is not None]
    return QuantizedModel([block for block, _ in done], ranges if len(ranges) == len(done) else None)


def end_to_end(
    session: Session,
    quant: QuantConfig,
    blocks: Sequence[BlockWeights],
    source: CalibrationSource,
    keeper: Keeper | None = None,
) -> QuantizedModel:
    """The end-to-end pass over scales and norms of quantized blocks, and the ranges of K and V anew where `quant.kv_bits` is 8.

    keeper: goes on where it was saved last, in the same bytes; None: nothing is saved or shown.
    """
    ckpt, tokens = session.checkpoint, source.tokens
    assert tokens is not None  # QuantConfig and `CalibrationSource.start` see to it
    floats = [ckpt.block(index) for index in range(session.config.num_layers)]
    done, norm, report = distill(
        floats, blocks, OuterWeights.of(ckpt), session.config, quant, tokens, session.device, keeper
    )
    ranges = measure_ranges(session, done, tokens) if quant.kv_bits == 8 else None
    return QuantizedModel(done, ranges, norm, {"kl_first": report.kl_first, "kl_last": report.kl_last})


def measure_ranges(session: Session, blocks: Sequence[BlockWeights], tokens: Tensor) -> list[HeadRanges]:
    """Ranges of K and V of finished blocks on the text (S, L), by one more pass."""
    stream = embed_tokens(session.checkpoint, tokens, session.device, session.dtype)
    found: list[HeadRanges] = []
    for block in blocks:
        seen = BlockStatistics(block.index)
        stream = advance(stream, block, session.config, session.dtype, seen.tap_ranges)
        found.append({name: (low.cpu(), high.cpu()) for name, (low, high) in seen.head_ranges().items()})
    return found
