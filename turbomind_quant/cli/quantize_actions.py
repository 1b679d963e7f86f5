"""What `quantize calibrate` and `quantize awq` do, once their flags are read: open, plan, check, run, and an outcome to show."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from calib_data.blocks import CalibrationSet
from convert.errors import UsageError
from convert.folder.output import OutputFolder
from convert.tokenizer.tokenizer import check_tokenizer
from quant.config import QuantConfig
from quant.estimate import Plan, plan_calibration, plan_quantization, refuse_ragged
from quant.progress import Progress
from quant.state.fingerprint import run_fingerprint
from turbomind_quant.cli.jobs import Flags, Job, announce, finished_outcome, make_job, with_text
from turbomind_quant.cli.outcome import SHOWN, Outcome
from turbomind_quant.cli.progress import ShownProgress, duration

TEXT_NAMES = ("calib_data", "text_column", "allow_fewer")  # what to read and how
TEXT_AMOUNTS = ("samples", "seqlen", "seed")  # settings that a loop over all presets gives to each


def run_calibrate(model: str, out: Path, quant: QuantConfig, flags: Flags, seqlen_given: bool) -> Outcome:
    """`quantize calibrate`."""
    from quant.statistics.calibrate import calibrate

    job = make_job(model, out, quant, flags, seqlen_given, None)
    with Progress("calibrate", ShownProgress()) as progress:
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


def run_awq(
    model: str, out: Path, quant: QuantConfig, flags: Flags, seqlen_given: bool, typed: Collection[str] = ()
) -> Outcome:
    """`quantize awq`; `typed` are the parameters that the user gave. Raises UsageError where they contradict each other."""
    from quant.run import check_statistics_use, quantize_model
    from quant.statistics.calibrate import open_statistics

    if flags["stats"] is not None:
        check_statistics_use(quant)
        if flags["calib_data"] is not None:
            raise UsageError("--stats and --calib-data name two calibrations: give one of them.")
        if flags["pad"]:
            raise UsageError(
                "--stats are those of the unpadded model: leave --pad out, or let `quantize awq` calibrate."
            )
    if flags["pad"] and quant.keep_ragged:
        raise UsageError(
            "--pad makes the group fit every linear and --keep-ragged leaves in float16 those that it does not fit: give one of them."
        )
    needs_text = flags["stats"] is None and (quant.needs_text or quant.kv_bits == 8)
    idle = idle_options(quant.recipe.name, typed) if not needs_text and flags["stats"] is None else ""
    job = make_job(model, out, quant, flags, seqlen_given, quant.group_size if flags["pad"] else None)
    if not needs_text:  # else it is loaded for the text
        check_tokenizer(job.ckpt.tokenizer_dir)
    with Progress(f"awq {quant.recipe.name}", ShownProgress()) as progress:
        if idle:
            progress.say(f"note: {idle}")
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


def idle_options(preset: str, typed: Collection[str]) -> str:
    """What to say of the text options given to a run that reads no text. Raises UsageError for those that name or shape a text."""
    refused = [option_name(name) for name in TEXT_NAMES if name in typed]
    if refused:
        raise UsageError(
            f"{preset} reads no calibration text, so {' and '.join(refused)} would do nothing: leave out what names a text, choose "
            "another preset, or add --kv-bits 8, which reads one."
        )
    idle = [option_name(name) for name in TEXT_AMOUNTS if name in typed]
    return f"{preset} reads no calibration text: {', '.join(idle)} without effect" if idle else ""


def option_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def awq_outcome(model: str, job: Job, plan: Plan, result: Any) -> Outcome:
    """What the user reads at the end of `quantize awq`."""
    from quant.evaluation.layer_report import role_table

    size = sum(path.stat().st_size for path in job.out.glob("*.safetensors"))
    quant = job.quant
    lines = [
        f"{job.out}: int{quant.bits} groups of {quant.group_size}, {plan.bits_per_weight:.3f} bits a quantized weight, "
        f"{size / 2**20:,.0f} MiB, {duration(result.seconds)}"
    ]
    if result.key_factors is not None:
        largest = max(max(high, 1 / low) for low, high in result.key_factors)
        lines.append(
            f"parameters for an int8 KV cache; channels of K made alike (factors of up to {largest:.3g} moved into Q)"
        )
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
    if quant.needs_text:
        parts.append(role_table(result.layers))
    return Outcome(result.to_json(), [*parts, "\n".join(following)])
