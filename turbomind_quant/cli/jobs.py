"""The common ground of `quantize calibrate` and `quantize awq`: model, text, device and place, checked before anything starts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calib_data.blocks import CalibrationSet
from calib_data.sources import TextRequest
from convert.checkpoint import Checkpoint
from convert.config import ModelConfig
from convert.errors import InputError, ResourceError, UsageError
from convert.folder.cache import cache_folder
from convert.folder.disk_space import check_free_space
from convert.folder.files import check_output_place
from convert.folder.output import OutputFolder, folder_state, read_manifest
from convert.readers import open_checkpoint
from engine.loading import use_device
from engine.model.forward import compute_dtype
from quant.config import QuantConfig
from quant.estimate import GIB, Plan
from quant.memory import memory_available_bytes, memory_limit_bytes
from quant.progress import Progress
from quant.state.fingerprint import run_fingerprint
from turbomind_quant.cli.outcome import Outcome

Flags = Mapping[str, Any]


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


def open_source(model: str, flags: Flags, pad_to: int | None = None) -> Checkpoint:
    """The float checkpoint to work on, padded where asked. Raises InputError for one that is quantized already."""
    ckpt = open_checkpoint(model, family=flags.get("family"))
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
    device = use_device(flags["device"])
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
    from convert.tokenizer.tokenizer import load_tokenizer

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
    from quant.text.calibration import read_text, write_text

    tokenizer = tokenizer_of(job.ckpt, flags)
    text, identity = read_text(job.request, job.ckpt, tokenizer)
    fingerprint = run_fingerprint(command, job.ckpt, job.quant, identity, job.device, job.dtype)
    with OutputFolder.begin(job.out, fingerprint, restart=job.restart, layout=layout) as folder:
        if folder.finished:
            return finished_outcome(job.out)
        if text is None:
            with progress.new_stage("writing text") as writing:
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
