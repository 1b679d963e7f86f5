"""What `quantize pack`, `unpack`, `verify` and `inspect` print."""

from convert.inspect import InspectReport
from convert.turbomind.unpack import UnpackResult
from convert.turbomind.writer import PackResult
from convert.verdict.judge import Verdict
from convert.verify import VerifyReport
from turbomind_quant.api.formats import PackEstimate
from turbomind_quant.cli.views.durations import duration

SIZES = (
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "max_position",
)


def pack_estimate_view(plan: PackEstimate) -> list[str]:
    """What a dry run of `pack` would write."""
    ranks = f", tp {plan.tp}" if plan.format == "turbomind" else ""
    return [
        f"pack: {plan.format}, {plan.weight_type}{ranks}, {plan.output_bytes / 2**20:,.0f} MiB; "
        f"output folder {plan.output}: {plan.output_state}"
    ]


def pack_view(path: str, target: str, result: PackResult) -> list[str]:
    """What was written, and what to do next."""
    return [
        f"{result.out}: {target}, {result.files} weight files, {result.weight_bytes / 2**20:,.0f} MiB, "
        f"{duration(result.elapsed_s)}",
        f"next: quantize verify {result.out} --source {path}",
    ]


def unpack_view(result: UnpackResult) -> list[str]:
    """The checkpoint that was written, and what to do next."""
    return [
        f"{result.out}: {result.kind} checkpoint, {duration(result.elapsed_s)}",
        f"next: evaluate ppl {result.out}",
    ]


def verify_view(report: VerifyReport) -> list[str]:
    """One line a check, then the verdict."""
    lines = [f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}" for check in report.checks]
    lines += [f"note: {note}" for note in report.notes]
    failed = [check.name for check in report.checks if not check.passed]
    if failed:
        verdict = f"{len(failed)} of {len(report.checks)} checks fail: {', '.join(failed)}"
    elif report.verified:
        verdict = "all checks passed"
    else:
        verdict = "all checks passed, but unverified: no manifest of ours says what its bytes should be"
    return [*lines, f"{report.path} ({report.kind}): {verdict}"]


def inspect_view(report: InspectReport) -> list[str]:
    """One line a fact."""
    facts: dict[str, str | None] = {
        "path": report.path,
        "kind": report.kind,
        "family": report.family,
        "quantization": report.quantization,
        "bits a weight": None if report.bits_per_weight is None else f"{report.bits_per_weight:.3f}",
        "parameters": None if report.parameters is None else f"{report.parameters / 1e6:,.1f} M",
        "size": f"{report.size_bytes / 2**20:,.1f} MiB in {len(report.tensors)} tensors",
    }
    if report.config is not None:
        facts |= {name.replace("_", " "): str(report.config[name]) for name in SIZES}
    lines = [f"{name:20}{text}" for name, text in facts.items() if text is not None]
    lines += [f"note: {note}" for note in report.notes]
    if report.problem is not None:
        lines.append(f"cannot be used: {report.problem}")
    return [*lines, *([] if report.verdict is None else verdict_view(report.verdict))]


def verdict_view(verdict: Verdict) -> list[str]:
    """The outcome, then each reason with its remedy and the file of the engine that says so."""
    told = {"loads": "loads", "caveat": "loads, with a caveat", "fails": "does not load"}
    where = f"{verdict.engine} {verdict.version}" + (f" on {verdict.tp} GPUs" if verdict.tp > 1 else "")
    lines = [f"{where}: {told[verdict.outcome]}"]
    for finding in verdict.findings:
        mark = "FAIL" if finding.outcome == "fails" else "note"
        lines += [f"  {mark} {finding.reason}", f"       {finding.remedy}", f"       (from {finding.source})"]
    return lines + [f"  note {note}" for note in verdict.notes]
