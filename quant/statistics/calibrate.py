"""`quantize calibrate`: one pass of text through the float model, block by block, and a file of statistics for each block.

S samples, L tokens a sample, H hidden size. In memory: one block, the hidden states (S, L, H), one block's Gram matrices.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from calib_data.blocks import CalibrationSet
from convert.checkpoint import BlockWeights, Checkpoint
from convert.errors import InputError
from convert.folder.output import FolderState, OutputFolder, base_of, folder_state, read_manifest
from quant.config import QuantConfig
from quant.session import Session
from quant.state.fingerprint import library_versions
from quant.state.frontier import Frontier
from quant.statistics.block import BlockStatistics, SavedStatistics, load_statistics
from quant.statistics.chunks import ChunkMemory
from quant.statistics.streams import advance, embed_tokens


def block_file(index: int) -> str:
    """Name of a block's statistics."""
    return f"block-{index:05d}.safetensors"


def calibrate(session: Session, quant: QuantConfig, text: CalibrationSet, folder: OutputFolder) -> list[str]:
    """Write the statistics of every block into `folder` and finish it. Returns the warnings that were recorded.

    Resumes from the last saved hidden states; the bytes are those of an uninterrupted run.
    """
    begin = time.monotonic()
    ckpt, dtype, progress = session.checkpoint, session.dtype, session.progress
    layers = ckpt.config.num_layers
    frontier = Frontier(folder.work)
    resumed = frontier.resume(lambda i: folder.has(block_file(i)))
    if resumed.tensors is None:
        stream = embed_tokens(ckpt, text.tokens, session.device, dtype)
    else:
        stream = resumed.tensors["fp"].to(session.device)
    records = resumed.records
    progress.start(layers, resumed.first, frontier.notes)
    memory = ChunkMemory(session.device, stream.shape[1])

    def capture(weights: BlockWeights, x: Tensor) -> tuple[Tensor, BlockStatistics]:
        seen = BlockStatistics(weights.index)
        return advance(x, weights, ckpt.config, dtype, seen.tap), seen

    for index in range(resumed.first, layers):
        (stream, block), note = memory.run(partial(capture, ckpt.block(index), stream), f"layer {index}")
        notes = [*([note] if note else ()), *block.check(), *unused_experts(block, ckpt)]
        folder.save_tensors(block_file(index), block.tensors())
        records.append({"warnings": notes})
        frontier.record(index, records[-1])
        if index + 1 < layers and frontier.is_due({"fp": stream}):
            frontier.save(index + 1, {"fp": stream})
        progress.layer(index, (), notes)
    ckpt.check_unchanged()
    warnings = [*text.warnings, *(note for record in records for note in record["warnings"])]
    facts = {
        "kind": "statistics",
        "source": {"digest": ckpt.digest(), "family": ckpt.config.family},
        "model": model_facts(ckpt),
        "calibration": text.provenance,
        "config": {"samples": quant.samples, "seqlen": quant.seqlen, "seed": quant.seed},
        "dtype": str(dtype).removeprefix("torch."),
        "versions": library_versions(),
        "warnings": warnings,
    }
    folder.finish(
        facts,
        {
            "seconds": round(time.monotonic() - begin, 3),
            "resumed_at_layer": resumed.first,
            "notes": frontier.notes,
        },
    )
    return warnings


def unused_experts(block: BlockStatistics, ckpt: Checkpoint) -> list[str]:
    """Experts that no token reached, by name."""
    names = {f"experts.{e}.in" for e in range(ckpt.config.num_experts)} - set(block.inputs)
    if not names:
        return []
    listed = ", ".join(sorted((name.split(".")[1] for name in names), key=int))
    return [f"layer {block.index}: no token of the calibration text reaches expert {listed}."]


def model_facts(ckpt: Checkpoint) -> dict[str, Any]:
    """The sizes that statistics and model must share."""
    config = ckpt.config
    names = (
        "family",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
    )
    return {name: getattr(config, name) for name in names}


@dataclass(frozen=True)
class StatisticsFolder:
    """A finished folder of statistics."""

    path: Path
    facts: dict[str, Any]

    def block(self, index: int) -> SavedStatistics:
        """The statistics of block `index`. Raises InputError where the file is damaged."""
        return load_statistics(self.path / block_file(index))

    @property
    def digest(self) -> str:
        """The manifest's digest of the whole folder."""
        return str(self.facts["digest"])


def open_statistics(path: Path, ckpt: Checkpoint) -> StatisticsFolder:
    """Open what `quantize calibrate` wrote. Raises InputError where it is unfinished or of another model."""
    state = folder_state(path)
    if state is FolderState.UNFINISHED:
        raise InputError(f"{path} is unfinished: give the `quantize calibrate` command again, it resumes.")
    if state is not FolderState.FINISHED or base_of(path) != path:
        raise InputError(
            f"{path} is no folder of statistics: `quantize calibrate MODEL -o {path}` makes one."
        )
    manifest = read_manifest(path)
    if manifest.data.get("kind") != "statistics":
        raise InputError(
            f"{path} is finished, but no folder of statistics: its manifest is of {manifest.data.get('kind')!r}."
        )
    manifest.check_sizes(path)
    if manifest.data["source"]["digest"] != ckpt.digest():
        theirs, ours = manifest.data.get("model"), model_facts(ckpt)
        raise InputError(
            f"{path} holds the statistics of another model (its weights have another digest"
            + (f"; sizes {theirs}, here {ours}" if theirs != ours else "")
            + "). Calibrate this model, or name the model that they belong to."
        )
    return StatisticsFolder(path, manifest.data)
