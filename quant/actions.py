"""What the `quantize` commands do, once their flags are read: open, plan, check, run, and an outcome to show."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import RenderableType

from calib_data.blocks import CalibrationSet
from calib_data.sources import TextRequest
from convert.checkpoint import Checkpoint
from convert.config import ModelConfig
from convert.errors import InputError, ResourceError, UsageError
from convert.files import check_free_space, check_output_place
from convert.gguf import default_cache
from convert.manifest import FolderState, OutputFolder, folder_state, read_manifest
from convert.readers import open_checkpoint
from engine.loading import resolve_device
from engine.model import compute_dtype
from quant.config import QuantConfig
from quant.fingerprint import run_fingerprint
from quant.memory import memory_available_bytes, memory_limit_bytes
from quant.plan import GIB, Plan, plan_calibration, plan_quantization, refuse_ragged
from quant.progress import PatientConsole, Progress, duration

Flags = Mapping[str, Any]
SHOWN = 12  # warnings and notes that are printed; all stand in the manifest
PLAIN_WIDTH = 160  # of tables that go to a file or a pipe


@dataclass
class Outcome:
    """A result: `document` for --json, `parts` (text or rich tables) for people, the exit code."""

    document: Any
    parts: list[RenderableType] = field(default_factory=list)
    exit_code: int = 0

    def show(self) -> None:
        console = PatientConsole(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
        for part in self.parts:
            if isinstance(part, str):
                click.echo(part)
            else:
                console.print(part)


@dataclass(frozen=True)
class Job:
    """The common ground of calibrate and awq."""

    ckpt: Checkpoint
    quant: QuantConfig
    request: TextRequest
    device: torch.device
    dtype: torch.dtype
    out: Path
    restart: bool
    dry_run: bool


def cache_folder() -> Path:
    """Where unpacked .gguf files, fetched models and self-written texts are kept: TMQ_CACHE, else the user's cache."""
    return default_cache(os.environ)


def open_source(model: str, flags: Flags, pad_to: int | None = None) -> Checkpoint:
    """The float checkpoint to work on, padded where asked. Raises InputError for one that is quantized already."""
    ckpt = open_checkpoint(model, family=flags.get("family"), cache_dir=cache_folder())
    if ckpt.config.quantization is not None:
        raise InputError(
            f"{model} is quantized already ({ckpt.kind}): give the float model that it was made from. `quantize pack`, `evaluate` "
            f"and `tmq serve` take it as it is."
        )
    if pad_to is not None:
        from convert.pad import pad_checkpoint

        ckpt = pad_checkpoint(ckpt, pad_to)
    return ckpt


def fit_seqlen(quant: QuantConfig, config: ModelConfig, is_given: bool) -> QuantConfig:
    """The default length lowered to the model's context. Raises UsageError for a given one that is longer."""
    if quant.seqlen <= config.max_position:
        return quant
    if is_given:
        raise UsageError(
            f"--seqlen is {quant.seqlen}, but the model's context is {config.max_position} tokens: ask for at most that."
        )
    return replace(quant, seqlen=config.max_position)


def make_job(
    model: str, out: Path, quant: QuantConfig, flags: Flags, seqlen_given: bool, pad_to: int | None
) -> Job:
    ckpt = open_source(model, flags, pad_to)
    check_output_place(out, ckpt.path)
    quant = fit_seqlen(quant, ckpt.config, seqlen_given)
    device = resolve_device(flags["device"])
    request = TextRequest(
        flags["calib_data"],
        quant.samples,
        quant.seqlen,
        quant.seed,
        flags["text_column"],
        flags["allow_fewer"],
    )
    dtype = compute_dtype(ckpt.config, device, flags["dtype"])
    return Job(ckpt, quant, request, device, dtype, out, not flags["resume"], flags["dry_run"])


def announce(job: Job, plan: Plan, progress: Progress) -> Outcome | None:
    """Say what the run takes; the outcome of a dry run. Raises ResourceError where disk or memory cannot hold it."""
    for note in job.ckpt.notes:
        progress.say(f"note: {note}")
    if job.dry_run:
        state = folder_state(job.out).value
        document = plan.to_json() | {"output": str(job.out), "output_state": state}
        return Outcome(document, ["\n".join([*plan.lines(), f"output folder {job.out}: {state}"])])
    for line in plan.lines():
        progress.say(line)
    check_free_space(job.out, plan.disk_bytes, f"quantize {plan.command}")
    check_memory(plan, progress)
    return None


def check_memory(plan: Plan, progress: Progress) -> None:
    """Raises ResourceError where this machine (or its container) never had the memory; warns where it has it not now."""
    if not plan.device.startswith("cpu"):
        return
    limit, available = memory_limit_bytes(), memory_available_bytes()
    if limit is not None and plan.peak_bytes > limit:
        raise ResourceError(
            f"the run needs about {plan.peak_bytes / GIB:.1f} GiB, but this machine or container has {limit / GIB:.1f} GiB in all. "
            f"Use fewer --samples or a smaller --seqlen, or give text (--calib-data) where the model would write its own."
        )
    if available is not None and plan.peak_bytes > available:
        progress.warn(
            f"about {plan.peak_bytes / GIB:.1f} GiB are needed and {available / GIB:.1f} GiB are free: it may run out."
        )


def tokenizer_of(ckpt: Checkpoint, flags: Flags) -> Any:
    from convert.tokenizer import load_tokenizer

    return load_tokenizer(ckpt.tokenizer_dir, trust_remote_code=flags.get("trust_remote_code", False))


def with_text(
    job: Job,
    command: str,
    layout: Any,
    flags: Flags,
    progress: Progress,
    act: Callable[[CalibrationSet, OutputFolder], Outcome],
) -> Outcome:
    """Read or write the calibration text, take the output folder, and act on both."""
    from quant.text import read_text, write_text

    tokenizer = tokenizer_of(job.ckpt, flags)
    text, identity = read_text(job.request, job.ckpt, tokenizer)
    fingerprint = run_fingerprint(command, job.ckpt, job.quant, identity, job.device, job.dtype)
    with OutputFolder.begin(job.out, fingerprint, restart=job.restart, layout=layout) as folder:
        if folder.finished:
            return finished_outcome(job.out)
        if text is None:
            with Progress("writing text") as writing:
                text = write_text(
                    job.request,
                    job.ckpt,
                    tokenizer,
                    job.device,
                    job.dtype,
                    folder.work,
                    cache_folder(),
                    progress.say,
                    writing.step,
                )
        for warning in text.warnings:
            progress.warn(warning)
        return act(text, folder)


def finished_outcome(out: Path) -> Outcome:
    """An earlier run had done everything but the last rename."""
    manifest = read_manifest(out).data
    return Outcome({"path": str(out), "manifest": manifest}, [f"{out} is finished"])


def run_calibrate(model: str, out: Path, quant: QuantConfig, flags: Flags, seqlen_given: bool) -> Outcome:
    """`quantize calibrate`."""
    from quant.calibrate import calibrate

    job = make_job(model, out, quant, flags, seqlen_given, None)
    with Progress("calibrate") as progress:
        plan = plan_calibration(job.ckpt.config, job.quant, job.device, job.dtype, job.request.is_generated)
        if (dry := announce(job, plan, progress)) is not None:
            return dry

        def act(text: CalibrationSet, folder: OutputFolder) -> Outcome:
            warnings = calibrate(job.ckpt, text, folder, job.quant, job.device, job.dtype, progress)
            document = {"path": str(out), "calibration": text.provenance, "warnings": warnings}
            following = f"next: quantize awq {model} -o OUT --preset fast --stats {out}"
            return Outcome(
                document, [f"statistics of {job.ckpt.config.num_layers} layers in {out}", following]
            )

        return with_text(job, "calibrate", "root", flags, progress, act)


def run_awq(model: str, out: Path, quant: QuantConfig, flags: Flags, seqlen_given: bool) -> Outcome:
    """`quantize awq`."""
    from quant.calibrate import open_statistics
    from quant.run import check_statistics_use, quantize_model

    if flags["stats"] is not None:
        check_statistics_use(quant)
        if flags["calib_data"] is not None:
            raise UsageError("--stats and --calib-data name two calibrations: give one of them.")
        if flags["pad"]:
            raise UsageError(
                "--stats are those of the unpadded model: leave --pad out, or let `quantize awq` calibrate."
            )
    job = make_job(model, out, quant, flags, seqlen_given, quant.group_size if flags["pad"] else None)
    needs_text = flags["stats"] is None and (quant.needs_text or quant.kv_bits == 8)
    with Progress(f"awq {quant.preset}") as progress:
        refuse_ragged(job.ckpt.config, job.quant)
        plan = plan_quantization(
            job.ckpt.config,
            job.quant,
            job.device,
            job.dtype,
            job.request.is_generated and needs_text,
            needs_text,
        )
        if (dry := announce(job, plan, progress)) is not None:
            return dry

        def act(source: Any, folder: OutputFolder) -> Outcome:
            result = quantize_model(job.ckpt, job.quant, source, folder, job.device, job.dtype, progress)
            return awq_outcome(model, job, plan, result)

        if needs_text:
            return with_text(job, "awq", "tmq", flags, progress, act)
        statistics = None if flags["stats"] is None else open_statistics(Path(flags["stats"]), job.ckpt)
        identity = None if statistics is None else {"statistics": statistics.digest}
        fingerprint = run_fingerprint("awq", job.ckpt, job.quant, identity, job.device, job.dtype)
        with OutputFolder.begin(out, fingerprint, restart=job.restart) as folder:
            return finished_outcome(out) if folder.finished else act(statistics, folder)


def awq_outcome(model: str, job: Job, plan: Plan, result: Any) -> Outcome:
    """What the user reads at the end of `quantize awq`."""
    from quant.report import role_table

    size = sum(path.stat().st_size for path in job.out.glob("*.safetensors"))
    quant = job.quant
    lines = [
        f"{job.out}: int{quant.bits} groups of {quant.group_size}, {plan.bits_per_weight:.3f} bits a quantized weight, "
        f"{size / 2**20:,.0f} MiB, {duration(result.seconds)}"
    ]
    if quant.bits < 4:
        lines.append(
            f"int{quant.bits} codes lie in 4-bit nibbles: for evaluation, they save nothing over int4"
        )
    remarks = [f"warning: {text}" for text in result.warnings] + [
        f"note: {text}" for text in result.standing_out
    ]
    lines += remarks[:SHOWN]
    if len(remarks) > SHOWN:
        lines.append(f"... and {len(remarks) - SHOWN} more in {job.out}/tmq/manifest.json")
    following = [f"next: evaluate ppl {model} {job.out}"]
    if quant.bits == 4 and quant.group_size == 128:
        following.append(f"      quantize pack {job.out} -o WORKSPACE")
    parts: list[RenderableType] = ["\n".join(lines)]
    if quant.preset != "rtn":
        parts.append(role_table(result.layers))
    return Outcome(result.to_json(), [*parts, "\n".join(following)])


def run_pack(path: str, out: Path, flags: Flags) -> Outcome:
    """`quantize pack`."""
    from convert.workspace_write import estimate_bytes, plan_packing, write_workspace

    ckpt = open_checkpoint(path, family=flags["family"], cache_dir=cache_folder())
    if flags["dry_run"]:
        packing = plan_packing(ckpt, flags["tp"], flags["dialect"], flags["dtype"])
        size = estimate_bytes(packing)
        document = {
            "tp": flags["tp"],
            "dialect": flags["dialect"],
            "weight_type": packing.weight_type,
            "output_bytes": size,
        }
        state = folder_state(out)
        return Outcome(
            document,
            [
                f"pack: {packing.weight_type}, tp {flags['tp']}, {size / 2**20:,.0f} MiB; output folder {out}: {state.value}"
            ],
        )
    with Progress("pack") as progress:
        for note in ckpt.notes:
            progress.say(f"note: {note}")
        result = write_workspace(
            ckpt,
            out,
            tp=flags["tp"],
            dialect=flags["dialect"],
            dtype=flags["dtype"],
            chat_template=flags["chat_template"],
            restart=not flags["resume"],
            progress=lambda done, total: progress.step(done, total),
        )
    lines = [
        f"{out}: TurboMind {flags['dialect']}, tp {flags['tp']}, {result.files} weight files, "
        f"{result.weight_bytes / 2**20:,.0f} MiB, {duration(result.elapsed_s)}",
        f"next: quantize verify {out} --source {path}",
    ]
    return Outcome(result.to_json(), ["\n".join(lines)])


def run_unpack(path: str, out: Path, flags: Flags) -> Outcome:
    """`quantize unpack`."""
    from convert.unpack import unpack_workspace
    from convert.workspace import WorkspaceCheckpoint

    ckpt = open_checkpoint(path)
    if not isinstance(ckpt, WorkspaceCheckpoint):
        raise InputError(f"{path} is no TurboMind workspace but {ckpt.kind}: there is nothing to unpack.")
    with Progress("unpack") as progress:
        for note in ckpt.notes:
            progress.say(f"note: {note}")
        result = unpack_workspace(ckpt, out, restart=not flags["resume"], progress=progress.step)
    lines = [f"{out}: {result.kind} checkpoint, {duration(result.elapsed_s)}", f"next: evaluate ppl {out}"]
    return Outcome(result.to_json(), ["\n".join(lines)])


def is_finished(path: Path) -> bool:
    return folder_state(path) is FolderState.FINISHED


def run_verify(path: str, flags: Flags) -> Outcome:
    """`quantize verify`: exit code 3 where a check fails."""
    from convert.verify import verify_path

    source = None if flags["source"] is None else Path(flags["source"])
    with Progress("verify") as progress:
        report = verify_path(Path(path), source, cache_dir=cache_folder(), progress=progress.step)
    marks = {True: "ok  ", False: "FAIL"}
    lines = [f"{marks[check.passed]} {check.name}: {check.detail}" for check in report.checks]
    lines += [f"note: {note}" for note in report.notes]
    lines.append(
        f"{path} ({report.kind}): "
        + ("all checks passed" if report.passed else "damaged or not what it claims")
    )
    return Outcome(report.to_json(), ["\n".join(lines)], 0 if report.passed else InputError.exit_code)


def run_inspect(path: str, flags: Flags) -> Outcome:
    """`quantize inspect`."""
    from convert.inspect import inspect_path

    report = inspect_path(Path(path), flags["family"])
    facts: dict[str, str | None] = {
        "path": report.path,
        "kind": report.kind,
        "family": report.family,
        "quantization": report.quantization,
        "bits a weight": None if report.bits_per_weight is None else f"{report.bits_per_weight:.3f}",
        "parameters": None if report.parameters is None else f"{report.parameters / 1e6:,.1f} M",
        "size": f"{report.size_bytes / 2**20:,.1f} MiB in {len(report.tensors)} tensors",
    }
    names = (
        "num_layers",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "vocab_size",
        "max_position",
    )
    facts |= {name.replace("_", " "): str(report.config[name]) for name in names if report.config is not None}
    lines = [f"{name:20}{text}" for name, text in facts.items() if text is not None]
    lines += [f"note: {note}" for note in report.notes]
    if report.problem is not None:
        lines.append(f"cannot be used: {report.problem}")
    return Outcome(report.to_json(), ["\n".join(lines)])
