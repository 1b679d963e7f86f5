"""`quantize awq`: the resumable run. Blocks go through the search and into the AWQ checkpoint, one finished file each.

A run that is killed anywhere and started again ends in the same bytes: the shard and the record of a block are written
before the hidden states behind it, and a block without all of them is done again from the last saved states.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from calib_data.blocks import CalibrationSet
from convert import kv_parameters as kv_file
from convert.awq.writer import AwqWriter
from convert.checkpoint import Checkpoint
from convert.checkpoint_view import WithFinalNorm
from convert.config import QuantFormat
from convert.errors import UsageError
from convert.folder.output import OutputFolder
from kernels.int4 import bits_per_weight
from quant.block_task import Streams
from quant.config import QuantConfig
from quant.evaluation.layer_report import above_rtn, far_above
from quant.kv.parameters import kv_parameters
from quant.memory import gpu_peak_gib, peak_rss_gib
from quant.progress import Progress
from quant.recipes import rows
from quant.selection import ragged_roles, skipped_modules
from quant.stage_clock import block_done, stage
from quant.state.end_to_end import PassWork
from quant.state.fingerprint import device_kind, library_versions
from quant.state.frontier import Frontier, Resumption
from quant.state.held_blocks import HeldBlocks
from quant.statistics.calibrate import StatisticsFolder
from quant.walk import (
    Step,
    distill_blocks,
    first_streams,
    measure_ranges,
    range_record,
    ranges_of,
    report_record,
    walk,
)


@dataclass(frozen=True)
class RunResult:
    """What a finished run says of itself; the manifest holds the same, layer by layer."""

    path: Path
    seconds: float
    first_layer: int
    layers: list[dict[str, Any]]
    warnings: list[str]
    standing_out: list[str]  # linears above RTN's loss, or far above their role's
    key_factors: list[tuple[float, float]] | None = None  # by layer: smallest and largest moved from K into Q

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def check_statistics_use(quant: QuantConfig) -> None:
    """Raises UsageError where saved statistics are given to what needs the text itself."""
    if quant.distill:
        raise UsageError(
            "--distill needs the calibration text, which --stats do not hold: leave out one of the two."
        )
    if quant.recipe.text != "statistics":
        known = ", ".join(row.name for row in rows() if row.text == "statistics")
        raise UsageError(
            f"--stats goes with --preset {known} alone: {quant.recipe.name} {'needs the calibration text itself' if quant.needs_text else 'reads no text'}. "
            f"Leave --stats out, or choose --preset {known}."
        )


def quantize_model(
    ckpt: Checkpoint,
    quant: QuantConfig,
    source: CalibrationSet | StatisticsFolder | None,
    folder: OutputFolder,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> RunResult:
    """Write the AWQ checkpoint into `folder` and finish it. `source` is None for `rtn` without KV parameters.

    Resumes where an earlier run stopped. Raises InputError for damaged weights or text, ResourceError for a full disk or GPU.
    """
    begin = time.monotonic()
    if isinstance(source, StatisticsFolder):
        check_statistics_use(quant)
    layers = ckpt.config.num_layers
    ragged = ragged_roles(ckpt.config, quant)
    skipped = skipped_modules(ckpt.config, quant)
    writer = AwqWriter(folder, ckpt, QuantFormat(quant.bits, quant.group_size, (*ragged, *skipped)))
    with stage("check the tensors outside the blocks"):
        writer.rest()  # read once now: damage there would show behind the last block
    # An end-to-end pass changes every block once more: until then they are held, so that a kill in it mixes nothing.
    store = HeldBlocks(folder.work, quant.bits, quant.group_size) if quant.distill else writer
    frontier = Frontier(folder.work)
    resumed = frontier.resume(store.has_block)
    records = resumed.records
    progress.start(layers, resumed.first, frontier.notes)
    for step in _steps(ckpt, quant, source, device, dtype, resumed):
        with stage("write the block"):
            store.write_block(step.index, step.result.weights)
        record = {
            "reports": [report_record(report, step.index) for report in step.result.reports],
            "warnings": step.warnings,
            "ranges": None if step.ranges is None else range_record(step.ranges),
            "key_factors": step.key_factors,
        }
        records.append(record)
        frontier.record(step.index, record)
        saved = _saved(step.result.streams)
        if step.index + 1 < layers and frontier.is_due(saved):
            with stage("save the hidden states"):
                frontier.save(step.index + 1, saved)
        elif step.index + 1 == layers and quant.distill:
            frontier.save(layers, {})  # a pass that is interrupted finds all blocks done
        progress.layer(step.index, step.result.reports, step.warnings)
        block_done()
    progress.stop()
    ckpt.check_unchanged()
    ranges = [None if record["ranges"] is None else ranges_of(record["ranges"]) for record in records]
    distilled = None
    if isinstance(store, HeldBlocks):
        assert isinstance(source, CalibrationSet)
        held = [store.read_block(index) for index in range(layers)]
        with progress.new_stage("end-to-end pass over scales and norms") as shown:
            keeper = PassWork(folder.work, shown)
            blocks, norm, distilled = distill_blocks(ckpt, held, quant, source.tokens, device, keeper)
        writer = AwqWriter(folder, WithFinalNorm(ckpt, norm), writer.fmt)
        for block in blocks:
            writer.write_block(block.index, block)
        if quant.kv_bits == 8:
            ranges = list(measure_ranges(ckpt, blocks, source.tokens, device, dtype))
    reports = [report for record in records for report in record["reports"]]
    moved = [record["key_factors"] for record in records]
    factors = None if None in moved else moved
    warnings = list(source.warnings) if isinstance(source, CalibrationSet) else []
    warnings += [warning for record in records for warning in record["warnings"]]
    warnings += [
        f"{role} stays float16 in every layer: K is no multiple of {quant.group_size}." for role in ragged
    ]
    warnings += _skip_notes(skipped)
    known = [part for part in ranges if part is not None]
    if quant.kv_bits == 8 and len(known) == layers:
        parameters, notes = kv_parameters(known)
        folder.save_tensors(kv_file.IN_CHECKPOINT, parameters)
        warnings += notes
    standing_out = above_rtn(reports) + far_above(reports)
    with stage("write what lies outside the blocks"):
        writer.finish_files()
    facts = {
        "kind": "awq",
        "bits": quant.bits,
        "group_size": quant.group_size,
        "bits_per_weight": round(bits_per_weight(quant.bits, quant.group_size), 6),
        "source": {
            "digest": ckpt.digest(),
            "family": ckpt.config.family,
            "padded_from": ckpt.config.padded_from,
        },
        "calibration": _calibration_facts(source),
        "config": quant.to_json(),
        "recipe": quant.recipe.to_json(),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_kind(device),
        "versions": library_versions(),
        "distilled": distilled,
        "key_factors": factors,
        "layers": reports,
        "warnings": warnings,
        "standing_out": standing_out,
    }
    seconds = time.monotonic() - begin
    report = {
        "seconds": round(seconds, 3),
        "resumed_at_layer": resumed.first,
        "peak_rss_gib": round(peak_rss_gib(), 3),
        "gpu_peak_gib": round(gpu_peak_gib(), 3),
        "threads": torch.get_num_threads(),
        "notes": frontier.notes,
    }
    folder.finish(facts, report)
    return RunResult(folder.folder, seconds, resumed.first, reports, warnings, standing_out, factors)


def _skip_notes(modules: list[str]) -> list[str]:
    """What the report says of modules that the recipe leaves in float."""
    if not modules:
        return []
    return [f"{len(modules)} modules stay float16, as the recipe asks: {', '.join(modules)}."]


def _steps(
    ckpt: Checkpoint,
    quant: QuantConfig,
    source: CalibrationSet | StatisticsFolder | None,
    device: torch.device,
    dtype: torch.dtype,
    resumed: Resumption,
) -> Iterator[Step]:
    """The blocks that are not done yet."""
    if resumed.first == ckpt.config.num_layers:
        return
    start = _start(ckpt, quant, source, device, dtype, resumed.tensors)
    tokens = source.tokens if isinstance(source, CalibrationSet) else None
    yield from walk(ckpt, quant, start, device, dtype, resumed.first, tokens)


def _start(
    ckpt: Checkpoint,
    quant: QuantConfig,
    source: CalibrationSet | StatisticsFolder | None,
    device: torch.device,
    dtype: torch.dtype,
    saved: dict[str, torch.Tensor] | None,
) -> Streams | StatisticsFolder | None:
    if not isinstance(source, CalibrationSet):
        return source
    if saved is None:
        return first_streams(ckpt, source.tokens, quant, device, dtype)
    quantized = saved["quantized"].to(device)
    return Streams(saved["fp"].to(device) if quant.recipe.reads_float_stream else quantized, quantized)


def _saved(streams: Streams | None) -> dict[str, torch.Tensor]:
    if streams is None:
        return {}
    if streams.fp is streams.quantized:
        return {"quantized": streams.quantized}
    return {"fp": streams.fp, "quantized": streams.quantized}


def _calibration_facts(source: CalibrationSet | StatisticsFolder | None) -> dict[str, Any] | None:
    if source is None:
        return None
    if isinstance(source, CalibrationSet):
        return source.provenance
    return {"statistics": source.digest, **source.facts["calibration"]}
