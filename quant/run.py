"""`quantize awq`: the resumable run. Blocks go through the search and into the AWQ checkpoint, one finished file each.

A run that is killed anywhere and started again ends in the same bytes: the shard and the record of a block are written
before the hidden states after it, and a block without all of them is done again from the last saved states.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from convert import kv_parameters as kv_file
from convert.awq.writer import AwqWriter
from convert.config import QuantFormat
from convert.folder.output import OutputFolder
from quant.config import QuantConfig
from quant.evaluation.run_facts import manifest_facts, report_facts
from quant.in_memory import QuantizedModel, end_to_end
from quant.kv.parameters import kv_parameters
from quant.selection import float_linears
from quant.session import Session
from quant.stage_clock import block_done, stage
from quant.state.block_files import BlockFiles
from quant.state.block_record import HeadRanges, all_ranges
from quant.state.end_to_end import PassWork
from quant.state.frontier import Frontier, Resumption
from quant.state.write_behind import WriteBehind
from quant.text.sources import CalibrationSource, saved_streams
from quant.walk import walk

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
    floats = float_linears(session.config, quant)
    writer = AwqWriter(folder, session.checkpoint, QuantFormat(quant.bits, quant.group_size, floats.names))
    with stage("read the tensors outside the blocks"):
        rest = writer.rest()  # now: damage there would show after the last block
    # An end-to-end pass changes every block once more: until then they wait in files, so that a kill in it mixes nothing.
    waiting = BlockFiles(folder.work, writer.fmt) if quant.distill else None
    frontier = Frontier(folder.work)
    resumed = frontier.resume((waiting or writer).has_block)
    with WriteBehind() as behind:
        if waiting is None:  # an end-to-end pass changes the final norm
            behind.put(partial(writer.write_rest, rest))
        del rest
        records = _quantize_blocks(session, quant, source, waiting or writer, frontier, resumed, behind)
    session.checkpoint.check_unchanged()
    ranges, divergence = all_ranges(records), None
    if waiting is not None:
        model = _distill_waiting(session, quant, source, waiting, folder)
        writer = AwqWriter(folder, model.outside(session.checkpoint), writer.fmt)
        for block in model.blocks:
            writer.write_block(block.index, block)
        ranges, divergence = model.ranges, model.divergence
    notes = [*floats.notes, *_write_kv_parameters(folder, ranges if quant.kv_bits == 8 else None)]
    with stage("write what lies outside the blocks"):
        writer.finish_files()
    facts = manifest_facts(session, quant, source, records, notes, divergence)
    facts["tensors"] = writer.accounting()
    seconds = time.monotonic() - begin
    folder.finish(facts, report_facts(seconds, resumed.first, frontier.notes))
    return RunResult(seconds, resumed.first)


def _quantize_blocks(
    session: Session,
    quant: QuantConfig,
    source: CalibrationSource,
    store: AwqWriter | BlockFiles,
    frontier: Frontier,
    resumed: Resumption,
    behind: WriteBehind,
) -> Records:
    """The blocks that are not done yet into `store`; the records of all."""
    progress, layers = session.progress, session.config.num_layers
    records = resumed.records
    progress.start(layers, resumed.first, frontier.notes)
    for step in walk(session, quant, source, resumed.first, resumed.tensors):
        records.append(step.record())
        with stage("write the block"):
            write = store.prepare_block(step.index, step.result.weights)
            behind.put(partial(_write_block, write, frontier, step.index, records[-1]))
        saved = saved_streams(step.result.streams)
        if step.index + 1 < layers and frontier.is_due(saved):
            behind.wait()  # a saved state speaks of blocks that are whole
            frontier.save_if_due(step.index + 1, saved)
        progress.layer(step.index, step.result.reports, step.warnings)
        block_done()
    behind.wait()
    if quant.distill and resumed.first < layers:
        frontier.save(layers, {})  # a pass that is interrupted finds all blocks done
    progress.stop()
    return records


def _write_block(write: Callable[[], None], frontier: Frontier, index: int, record: dict[str, Any]) -> None:
    """The files of a block, then its record: a block with a record is whole."""
    write()
    frontier.record(index, record)


def _distill_waiting(
    session: Session,
    quant: QuantConfig,
    source: CalibrationSource,
    waiting: BlockFiles,
    folder: OutputFolder,
) -> QuantizedModel:
    """The end-to-end pass over the blocks that wait for it; it goes on where an earlier run saved it."""
    blocks = [waiting.read_block(index) for index in range(session.config.num_layers)]
    with session.progress.new_stage("end-to-end pass over scales and norms") as shown:
        return end_to_end(session, quant, blocks, source, PassWork(folder.work, shown))


def _write_kv_parameters(folder: OutputFolder, ranges: Sequence[HeadRanges] | None) -> list[str]:
    """The parameters of a static int8 KV cache from these ranges; None: none are asked for. Returns warnings about them."""
    if ranges is None:
        return []
    parameters, notes = kv_parameters(ranges)
    folder.save_tensors(kv_file.IN_CHECKPOINT, parameters)
    return notes
