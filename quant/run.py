"""`quantize awq`: the resumable run. Blocks go through the search and into the AWQ checkpoint, one finished file each.

A run that is killed anywhere and started again ends in the same bytes: the shard and the record of a block are written
before the hidden states after it, and a block without all of them is done again from the last saved states.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from convert import kv_parameters as kv_file
from convert.awq.writer import AwqWriter
from convert.config import QuantFormat
from convert.folder.output import OutputFolder
from quant.config import QuantConfig
from quant.evaluation.run_facts import manifest_facts, report_facts
from quant.in_memory import QuantizedModel, end_to_end
from quant.kv.parameters import kv_parameters
from quant.selection import ragged_roles, skipped_modules
from quant.session import Session
from quant.stage_clock import block_done, stage
from quant.state.block_record import HeadRanges, all_ranges
from quant.state.end_to_end import PassWork
from quant.state.frontier import Frontier, Resumption
from quant.state.held_blocks import HeldBlocks
from quant.text.sources import CalibrationSource, saved_streams
from quant.walk import Step, walk

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class RunResult:
    """How this process came to the end of a run; the manifest holds the rest. `first_layer` is above 0 where it resumed."""

    seconds: float
    first_layer: int


def quantize_model(
    session: Session, quant: QuantConfig, source: CalibrationSource, folder: OutputFolder
) -> RunResult:
    """Write the AWQ checkpoint into `folder` and finish it. Resumes where an earlier run stopped.

    Raises InputError for damaged weights or text, UsageError where the recipe cannot search on `source`, ResourceError for a
    full disk or GPU.
    """
    begin = time.monotonic()
    source.check(quant)
    writer = _writer(session, quant, folder)
    # An end-to-end pass changes every block once more: until then they are held, so that a kill in it mixes nothing.
    held = HeldBlocks(folder.work, quant.bits, quant.group_size) if quant.distill else None
    frontier = Frontier(folder.work)
    resumed = frontier.resume((held or writer).has_block)
    records = _quantize_blocks(session, quant, source, held or writer, frontier, resumed)
    session.checkpoint.check_unchanged()
    ranges, divergence = all_ranges(records), None
    if held is not None:
        model = _distill_held(session, quant, source, held, folder)
        writer = AwqWriter(folder, model.outside(session.checkpoint), writer.fmt)
        for block in model.blocks:
            writer.write_block(block.index, block)
        ranges, divergence = model.ranges, model.divergence
    notes = _float_notes(session, quant) + _write_kv_parameters(folder, quant, ranges)
    with stage("write what lies outside the blocks"):
        writer.finish_files()
    facts = manifest_facts(session, quant, source, records, notes, divergence)
    facts["tensors"] = writer.accounting()
    seconds = time.monotonic() - begin
    folder.finish(facts, report_facts(seconds, resumed.first, frontier.notes))
    return RunResult(seconds, resumed.first)


def _writer(session: Session, quant: QuantConfig, folder: OutputFolder) -> AwqWriter:
    """The writer of the checkpoint. What lies outside the blocks is read once now: damage there would show after the last block."""
    floats = (*ragged_roles(session.config, quant), *skipped_modules(session.config, quant))
    writer = AwqWriter(folder, session.checkpoint, QuantFormat(quant.bits, quant.group_size, floats))
    with stage("check the tensors outside the blocks"):
        writer.rest()
    return writer


def _quantize_blocks(
    session: Session,
    quant: QuantConfig,
    source: CalibrationSource,
    store: AwqWriter | HeldBlocks,
    frontier: Frontier,
    resumed: Resumption,
) -> Records:
    """The blocks that are not done yet into `store`; the records of all."""
    progress, layers = session.progress, session.config.num_layers
    records = resumed.records
    progress.start(layers, resumed.first, frontier.notes)
    for step in walk(session, quant, source, resumed.first, resumed.tensors):
        with stage("write the block"):
            store.write_block(step.index, step.result.weights)
        records.append(step.record())
        frontier.record(step.index, records[-1])
        _save(frontier, step, layers, quant)
        progress.layer(step.index, step.result.reports, step.warnings)
        block_done()
    progress.stop()
    return records


def _save(frontier: Frontier, step: Step, layers: int, quant: QuantConfig) -> None:
    """Save the hidden states after a block where that is due; the end of the blocks where an end-to-end pass follows."""
    streams = saved_streams(step.result.streams)
    if step.index + 1 < layers and frontier.is_due(streams):
        with stage("save the hidden states"):
            frontier.save(step.index + 1, streams)
    elif step.index + 1 == layers and quant.distill:
        frontier.save(layers, {})  # a pass that is interrupted finds all blocks done


def _distill_held(
    session: Session, quant: QuantConfig, source: CalibrationSource, held: HeldBlocks, folder: OutputFolder
) -> QuantizedModel:
    """The end-to-end pass over the blocks that are held; it goes on where an earlier run saved it."""
    blocks = [held.read_block(index) for index in range(session.config.num_layers)]
    with session.progress.new_stage("end-to-end pass over scales and norms") as shown:
        return end_to_end(session, quant, blocks, source, PassWork(folder.work, shown))


def _write_kv_parameters(
    folder: OutputFolder, quant: QuantConfig, ranges: Sequence[HeadRanges] | None
) -> list[str]:
    """The parameters of a static int8 KV cache, where they are asked for; warnings about them."""
    if quant.kv_bits != 8 or ranges is None:
        return []
    parameters, notes = kv_parameters(ranges)
    folder.save_tensors(kv_file.IN_CHECKPOINT, parameters)
    return notes


def _float_notes(session: Session, quant: QuantConfig) -> list[str]:
    """What the manifest says of linears that stay float: by the group size, or because the recipe says so."""
    notes = [
        f"{role} stays float16 in every layer: K is no multiple of {quant.group_size}."
        for role in ragged_roles(session.config, quant)
    ]
    skipped = skipped_modules(session.config, quant)
    if skipped:
        notes.append(f"{len(skipped)} modules stay float16, as the recipe asks: {', '.join(skipped)}.")
    return notes
