"""What `quantize pack`, `unpack`, `verify` and `inspect` do, once their flags are read."""

from pathlib import Path

from convert.errors import InputError
from convert.folder.output import folder_state
from convert.readers import open_checkpoint
from quant.progress import Progress
from turbomind_quant.cli.jobs import Flags
from turbomind_quant.cli.outcome import Outcome
from turbomind_quant.cli.progress import ShownProgress, duration


def run_pack(path: str, out: Path, flags: Flags) -> Outcome:
    """`quantize pack`."""
    from convert.turbomind.writer import estimate_bytes, plan_packing, write_workspace

    ckpt = open_checkpoint(path, family=flags["family"])
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
    with Progress("pack", ShownProgress()) as progress:
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
    from convert.turbomind.reader import WorkspaceCheckpoint
    from convert.turbomind.unpack import unpack_workspace

    ckpt = open_checkpoint(path)
    if not isinstance(ckpt, WorkspaceCheckpoint):
        raise InputError(f"{path} is no TurboMind workspace but {ckpt.kind}: there is nothing to unpack.")
    with Progress("unpack", ShownProgress()) as progress:
        for note in ckpt.notes:
            progress.say(f"note: {note}")
        result = unpack_workspace(ckpt, out, restart=not flags["resume"], progress=progress.step)
    lines = [f"{out}: {result.kind} checkpoint, {duration(result.elapsed_s)}", f"next: evaluate ppl {out}"]
    return Outcome(result.to_json(), ["\n".join(lines)])


def run_verify(path: str, flags: Flags) -> Outcome:
    """`quantize verify`: exit code 3 where a check fails."""
    from convert.verify import verify_path

    source = None if flags["source"] is None else Path(flags["source"])
    with Progress("verify", ShownProgress()) as progress:
        report = verify_path(Path(path), source, progress=progress.step)
    marks = {True: "ok  ", False: "FAIL"}
    lines = [f"{marks[check.passed]} {check.name}: {check.detail}" for check in report.checks]
    lines += [f"note: {note}" for note in report.notes]
    failed = [check.name for check in report.checks if not check.passed]
    lines.append(
        f"{path} ({report.kind}): "
        + (
            f"{len(failed)} of {len(report.checks)} checks fail: {', '.join(failed)}"
            if failed
            else "all checks passed"
        )
    )
    return Outcome(report.to_json(), ["\n".join(lines)], 0 if report.passed else InputError.exit_code)


def run_inspect(path: str, flags: Flags) -> Outcome:
    """`quantize inspect`: exit code 3 where the model is listed but cannot be used."""
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
    return Outcome(
        report.to_json(), ["\n".join(lines)], 0 if report.problem is None else InputError.exit_code
    )
