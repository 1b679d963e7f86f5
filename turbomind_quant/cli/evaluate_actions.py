"""What the `evaluate` commands do, once their flags are read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from calib_data.sources import TextRequest, load_blocks
from convert.checkpoint import Checkpoint
from convert.errors import UsageError
from convert.folder.cache import cache_folder
from convert.folder.files import write_json
from convert.readers import open_checkpoint
from engine.loading import use_device
from engine.measure.perplexity import PerplexityResult, Reference
from engine.model.forward import Model, compute_dtype
from kernels.int4 import bits_per_weight
from quant.config import BITS, GROUP_SIZES, QuantConfig
from quant.estimate import refuse_ragged
from quant.evaluation.peers import check_peers
from quant.evaluation.perplexity import (
    Judged,
    Judgement,
    compared,
    judge,
    load_eval_text,
    protocol_line,
    release,
    simulation,
    tokens_of,
)
from quant.evaluation.table import Row, TableRequest, evaluate_table, needs_ranges
from quant.progress import Progress
from quant.recipes import label_of, methods
from turbomind_quant.cli.jobs import fit_seqlen, open_source, tokenizer_of
from turbomind_quant.cli.outcome import Outcome
from turbomind_quant.cli.progress import ShownProgress

Flags = Mapping[str, Any]


def run_ppl(paths: Sequence[str], flags: Flags) -> Outcome:
    """`evaluate ppl`: the first path is the reference of the others."""
    text = load_eval_text(flags["dataset"], flags["text"])
    device = use_device(flags["device"])
    how = Judgement(flags["seqlen"], flags["windows"], flags["kl_windows"] if len(paths) > 1 else 0)
    rows: list[Judged] = []
    first: PerplexityResult | None = None
    reference: Reference | None = None
    with Progress("evaluate ppl", ShownProgress()) as progress:
        for path in paths:
            ckpt = open_checkpoint(path, family=flags["family"])
            tokens = tokens_of(text, tokenizer_of(ckpt, flags), ckpt)
            kv = simulation(ckpt, flags["kv_bits"], flags["kv_mode"])
            dtype = compute_dtype(ckpt.config, device, flags["dtype"])
            model = Model.from_checkpoint(ckpt, device, dtype, streamed=flags["streamed"])
            for note in model.notes:
                progress.say(f"note: {Path(path).name}: {note}")
            result, kept = judge(model, tokens, how, kv, reference)
            if first is None:
                first, reference = result, kept
            rows.append(compared(path, ckpt.kind, result, None if result is first else first))
            progress.say(f"{path}: perplexity {result.ppl:.3f} in {result.seconds:.0f} s")
            del model
            release(device)
    document = {
        "protocol": protocol_line([row.result for row in rows]),
        "rows": [row.to_json() for row in rows],
    }
    return Outcome(document, [ppl_table(rows), str(document["protocol"])])


def ppl_table(rows: Sequence[Judged]) -> Table:
    """A row a model; lower perplexity and KL are better."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    for name in ("kind", "kv", "perplexity", "to the first", "95 %", "KL", "top-1"):
        table.add_column(name, justify="left" if name in ("kind", "kv") else "right")
    for row in rows:
        result, against = row.result, row.against
        table.add_row(
            row.name,
            row.kind,
            "float" if result.kv_bits == 16 else f"int{result.kv_bits} {result.kv_mode}",
            f"{result.ppl:.3f}",
            "" if against is None else f"{against.difference:+.3f}",
            "" if against is None else f"{against.low:+.3f} .. {against.high:+.3f}",
            "" if result.kl is None else f"{result.kl:.4f}",
            "" if result.top1 is None else f"{result.top1:.1%}",
        )
    return table


def run_table(model: str, flags: Flags) -> Outcome:
    """`evaluate table`."""
    quant = QuantConfig(samples=flags["samples"], seqlen=flags["seqlen"], seed=flags["seed"])
    groups = numbers(flags["groups"], "--group-size", GROUP_SIZES)
    ckpt = open_source(model, flags, max(groups) if flags["pad"] else None)
    quant = fit_seqlen(quant, ckpt.config, False)
    request = TableRequest(
        base=quant,
        methods=tuple(chosen(flags["methods"], "--methods", methods())),
        bits=numbers(flags["bits"], "--bits", BITS),
        group_sizes=groups,
        kv=caches(flags["kv_bits"]),
        peers=chosen_peers(flags["peers"], flags["pad"], ckpt),
        how=Judgement(flags["window"], flags["windows"], flags["kl_windows"]),
    )
    for arm in request.arms():
        if arm is not None:
            refuse_ragged(ckpt.config, arm)
    device = use_device(flags["device"])
    dtype = compute_dtype(ckpt.config, device, flags["dtype"])
    tokenizer = tokenizer_of(ckpt, flags)
    eval_tokens = tokens_of(load_eval_text(flags["dataset"], flags["text"]), tokenizer, ckpt)
    with Progress("evaluate table", ShownProgress()) as progress:
        text = None
        if (
            request.peers
            or needs_ranges(request)
            or any(arm is not None and arm.needs_text for arm in request.arms())
        ):
            from quant.text.calibration import vocabulary_of, write_text

            source = TextRequest(
                flags["calib_data"],
                quant.samples,
                quant.seqlen,
                quant.seed,
                flags["text_column"],
                flags["allow_fewer"],
            )
            if source.is_generated:
                with progress.new_stage("writing text") as writing:
                    text = write_text(
                        source,
                        ckpt,
                        tokenizer,
                        device,
                        dtype,
                        None,
                        cache_folder(),
                        progress.say,
                        writing.step,
                    )
            else:
                text = load_blocks(source, tokenizer, vocabulary_of(ckpt, tokenizer))
            for warning in text.warnings:
                progress.warn(warning)
        rows = evaluate_table(ckpt, Path(model).name, request, text, eval_tokens, device, dtype, progress.say)
    calibration = None if text is None else text.provenance
    document = {"calibration": calibration, "rows": [row.to_json() for row in rows]}
    if flags["output"]:
        write_json(Path(flags["output"]), {"kind": "table", **document})
    note = f"{rows[0].windows} windows of {eval_tokens.text}; calibration: " + (
        "none"
        if calibration is None
        else f"{calibration['samples']} x {calibration['seqlen']} tokens of {calibration['source']}"
    )
    return Outcome(document, [method_table(rows), note])


def method_table(rows: Sequence[Row]) -> Table:
    """Methods down, figures across: perplexity with its distance from float, KL, top-1, seconds."""
    table = Table(box=SIMPLE_HEAD)
    for name in (
        "method",
        "bits",
        "bits/weight",
        "kv",
        "perplexity",
        "95 % above float",
        "KL",
        "top-1",
        "seconds",
    ):
        table.add_column(name, justify="left" if name in ("method", "kv") else "right")
    last = None
    for row in rows:
        if last is not None and row.bits != last:
            table.add_section()
        last = row.bits
        group = row.group_size
        table.add_row(
            label_of(row.method) + (" + distill" if row.distill else ""),
            "16" if group is None else f"{row.bits} g{group}",
            "" if group is None else f"{bits_per_weight(row.bits, group):.3f}",
            "float" if row.kv_bits == 16 else f"int{row.kv_bits} {row.kv_mode}",
            f"{row.ppl:.3f}",
            ""
            if row.ppl_diff_ci95 is None
            else f"{row.ppl_diff_ci95[0]:+.3f} .. {row.ppl_diff_ci95[1]:+.3f}",
            "" if row.kl is None else f"{row.kl:.4f}",
            "" if row.top1 is None else f"{row.top1:.1%}",
            f"{row.seconds:.0f}" if group is not None else "",
        )
    return table


def chosen(text: str, flag: str, known: Sequence[str]) -> list[str]:
    """A comma-separated list of known names."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise UsageError(f"{flag} {text!r}: expected one or more of {', '.join(known)}, separated by commas.")
    return list(dict.fromkeys(names))


def chosen_peers(names: str | None, is_padded: bool, ckpt: Checkpoint) -> tuple[str, ...]:
    """The peers asked for. Raises UsageError for one that is unknown, not installed, or cannot read this model."""
    if not names:
        return ()
    found = tuple(name.strip() for name in names.split(",") if name.strip())
    check_peers(found)
    if is_padded or ckpt.kind != "hf":
        raise UsageError(
            "--peers read the model's own folder of safetensors: leave --pad out, and give such a folder."
        )
    return found


def numbers(text: str, flag: str, known: Sequence[int]) -> tuple[int, ...]:
    """A comma-separated list of known numbers."""
    return tuple(int(name) for name in chosen(text, flag, [str(number) for number in known]))


def caches(text: str) -> tuple[tuple[int, str], ...]:
    """16, 8, 4, 8:static, 4:static -> (bits, mode)."""
    known = ("16", "8", "4", "8:dynamic", "8:static", "4:dynamic", "4:static")
    pairs = (name.partition(":") for name in chosen(text, "--kv-bits", known))
    return tuple((int(bits), mode or "dynamic") for bits, _, mode in pairs)
