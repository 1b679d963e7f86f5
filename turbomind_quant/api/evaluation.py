"""`perplexity`, `table` and `report`: what quantization cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from calib_data.blocks import CalibrationSet
from calib_data.sources import TextRequest, load_blocks
from convert.checkpoint import Checkpoint
from convert.errors import UsageError
from convert.folder.files import write_json
from convert.readers import open_checkpoint
from convert.tokenizer.tokenizer import Tokenizer, load_tokenizer
from engine.loading import use_device
from engine.measure.perplexity import EvalTokens, PerplexityResult, Reference
from engine.model.forward import Model, compute_dtype
from quant.config import BITS, GROUP_SIZES, QuantConfig
from quant.estimate import refuse_ragged
from quant.evaluation.page import write_page
from quant.evaluation.peers import check_peers
from quant.evaluation.perplexity import (
    EvalText,
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
from quant.progress import Listener, Progress
from quant.recipe_file import find_recipe
from quant.recipes import Recipe, usual_methods
from quant.recipes import methods as known_methods
from quant.session import Session, fit_seqlen, open_session
from quant.text.calibration import vocabulary_of
from turbomind_quant.api.choices import Dtype, KvMode, StrPath, check_one, check_positive, chosen
from turbomind_quant.api.preparation import TextChoice, written_text

CACHES = ("16", "8", "4", "8:dynamic", "8:static", "4:dynamic", "4:static")


@dataclass(frozen=True)
class PerplexityReport:
    """Models judged on the same text. `rows`: one a model, in the order given; `protocol`: one sentence on how they were measured."""

    rows: tuple[Judged, ...]
    protocol: str

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return {"protocol": self.protocol, "rows": [row.to_json() for row in self.rows]}


@dataclass(frozen=True)
class TableReport:
    """Methods judged on one model. `calibration`: where the text came from; None where no method read any."""

    rows: tuple[Row, ...]
    calibration: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return {"calibration": self.calibration, "rows": [row.to_json() for row in self.rows]}


def perplexity(
    *paths: StrPath,
    dataset: str | None = None,
    text: StrPath | None = None,
    windows: int | None = None,
    seqlen: int | None = None,
    kl_windows: int = 32,
    kv_bits: int = 16,
    kv_mode: KvMode = "dynamic",
    streamed: bool = False,
    trust_remote_code: bool = False,
    device: str = "auto",
    dtype: Dtype = "auto",
    family: str | None = None,
    progress: Listener | None = None,
) -> PerplexityReport:
    """Perplexity of one or more models on the same text; lower is better. The first path is the reference of the others.

    Args:
        paths: checkpoints (float or AWQ), .gguf files, TurboMind workspaces.
        dataset: "builtin" (a sample that ships with us, the default) or "wikitext2" (the published protocol).
        text: a text file as it stands; beside `dataset="wikitext2"`, the raw test split to take its rows from.
        windows: only the first so many; None: all. seqlen: tokens of a window; None: 2048, or the model's context.
        kl_windows: windows on which KL divergence and top-1 agreement with the first path are measured; 0: none.
        kv_bits: 16, 8 or 4: simulate a KV cache of this width, exactly.
        kv_mode: "dynamic": scales a token; "static": those that `quantize(kv_bits=8)` wrote.
        streamed: hold one decoder block at a time, for models larger than memory.
        trust_remote_code, device, dtype, family, progress: as in `quantize`.

    Raises UsageError for choices that contradict each other, InputError for a path or text that cannot be used.
    """
    if not paths:
        raise UsageError("nothing to measure: give the path of a model.")
    _check_windows(windows, kl_windows)
    check_one(kv_bits, "--kv-bits", (16, 8, 4))
    check_one(kv_mode, "--kv-mode", get_args(KvMode))
    judged_by = Judgement(seqlen, windows, kl_windows if len(paths) > 1 else 0)
    words = load_eval_text(dataset, None if text is None else str(text))
    place = use_device(device)
    rows: list[Judged] = []
    first: PerplexityResult | None = None
    reference: Reference | None = None
    with Progress("evaluate ppl", progress) as run:
        checkpoints = [open_checkpoint(path, family=family) for path in paths]
        tokens = [_tokens(words, ckpt, trust_remote_code) for ckpt in checkpoints]
        caches = [simulation(ckpt, kv_bits, kv_mode) for ckpt in checkpoints]
        for path, ckpt, ids, cache in zip(paths, checkpoints, tokens, caches, strict=True):
            model = Model.from_checkpoint(
                ckpt, place, compute_dtype(ckpt.config, place, dtype), streamed=streamed
            )
            for note in model.notes:
                run.say(f"note: {Path(path).name}: {note}")
            result, kept = judge(model, ids, judged_by, cache, reference)
            if first is None:
                first, reference = result, kept
            rows.append(compared(str(path), ckpt.kind, result, None if result is first else first))
            run.say(f"{path}: perplexity {result.ppl:.3f} in {result.seconds:.0f} s")
            del model
            release(place)
    return PerplexityReport(tuple(rows), protocol_line([row.result for row in rows]))


def _tokens(text: EvalText, ckpt: Checkpoint, trust_remote_code: bool) -> EvalTokens:
    return tokens_of(text, load_tokenizer(ckpt.tokenizer_dir, trust_remote_code=trust_remote_code), ckpt)


def table(
    model: StrPath,
    *,
    methods: Sequence[str | Recipe] | None = None,
    bits: Sequence[int] = (4, 3),
    group_size: Sequence[int] = (128,),
    kv_bits: Sequence[str] = ("16",),
    kl_windows: int = 32,
    pad: bool = False,
    peers: Sequence[str] = (),
    output: StrPath | None = None,
    dataset: str | None = None,
    text: StrPath | None = None,
    windows: int | None = None,
    eval_seqlen: int | None = None,
    calib_data: str | None = None,
    text_column: str = "text",
    samples: int = QuantConfig.samples,
    seqlen: int | None = None,
    seed: int = QuantConfig.seed,
    allow_fewer: bool = False,
    trust_remote_code: bool = False,
    device: str = "auto",
    dtype: Dtype = "auto",
    family: str | None = None,
    progress: Listener | None = None,
) -> TableReport:
    """The perplexity table of the float `model`: each method quantizes it in memory and is judged on the same windows.

    Args:
        methods: rows: "fp16", presets, a preset with "+distill", files of recipes, or recipes; None: all but the slow ones. bits, group_size: every method has a row for each.
        kv_bits: caches for every row, of "16", "8", "4", "8:static" and "4:static".
        kl_windows: windows for KL divergence and top-1 agreement with the float model; 0: none.
        pad: zero-pad the model exactly, so that the group fits every linear.
        peers: other quantizers, where installed, on the same blocks.
        output: also write the rows to this JSON file, for `report`.
        dataset, text, windows: as in `perplexity`. eval_seqlen: tokens of a window of that text.
        The calibration text (`calib_data` to `trust_remote_code`), device, dtype, family and progress: as in `quantize`.

    Raises UsageError for choices that contradict each other, InputError for a model or text that cannot be used.
    """
    _check_windows(windows, kl_windows)
    choice = TextChoice(calib_data, text_column, samples, seqlen, seed, allow_fewer, trust_remote_code)
    groups = chosen(group_size, "--group-size", GROUP_SIZES)
    rows = _methods(usual_methods() if methods is None else methods)
    widths, caches = chosen(bits, "--bits", BITS), chosen(kv_bits, "--kv-bits", CACHES)
    words = load_eval_text(dataset, None if text is None else str(text))
    with Progress("evaluate table", progress) as run:
        session = open_session(
            model,
            device=device,
            dtype=dtype,
            family=family,
            pad_to=max(groups) if pad else None,
            progress=run,
        )
        request = TableRequest(
            base=fit_seqlen(choice.config(), session.config, seqlen is not None),
            methods=rows,
            bits=widths,
            group_sizes=groups,
            kv=tuple(_cache(name) for name in caches),
            peers=_usable_peers(peers, pad, session),
            how=Judgement(eval_seqlen, windows, kl_windows),
        )
        for arm in request.arms():
            if arm is not None:
                refuse_ragged(session.config, arm)
        tokenizer = choice.tokenizer(session)
        tokens = tokens_of(words, tokenizer, session.checkpoint)
        blocks = _calibration_text(request, choice, session, tokenizer)
        made = evaluate_table(
            session.checkpoint,
            Path(model).name,
            request,
            blocks,
            tokens,
            session.device,
            session.dtype,
            run.say,
        )
    result = TableReport(tuple(made), None if blocks is None else blocks.provenance)
    if output is not None:
        write_json(Path(output), {"kind": "table", **result.to_json()})
    return result


def _check_windows(windows: int | None, kl_windows: int) -> None:
    """Raises UsageError for counts of windows that measure nothing."""
    check_positive(windows, "--windows", 1)
    if kl_windows < 0:
        raise UsageError(f"--kl-windows {kl_windows}: expected 0 (none) or more.")


def _methods(values: Sequence[str | Recipe]) -> tuple[str | Recipe, ...]:
    """The rows asked for, files of recipes read. Raises UsageError for a name that is not known."""
    rows = [find_recipe(value) for value in values]
    names = [row for row in rows if isinstance(row, str)]
    if names or not rows:
        chosen(names, "--methods", known_methods())
    return tuple(dict.fromkeys(rows))


def _cache(name: str) -> tuple[int, str]:
    """ "8:static" -> (8, "static"); "8" -> (8, "dynamic")."""
    bits, _, mode = name.partition(":")
    return int(bits), mode or "dynamic"


def _usable_peers(names: Sequence[str], is_padded: bool, session: Session) -> tuple[str, ...]:
    """The peers asked for. Raises UsageError for one that is unknown, not installed, or cannot read this model."""
    check_peers(names)
    if names and (is_padded or session.checkpoint.kind != "hf"):
        raise UsageError(
            "--peers read the model's own folder of safetensors: leave --pad out, and give such a folder."
        )
    return tuple(names)


def _calibration_text(
    request: TableRequest, choice: TextChoice, session: Session, tokenizer: Tokenizer
) -> CalibrationSet | None:
    """The text of all rows; None where no row reads any."""
    arms = [arm for arm in request.arms() if arm is not None]
    if not (request.peers or needs_ranges(request) or any(arm.needs_text for arm in arms)):
        return None
    source: TextRequest = choice.request(request.base)
    if source.is_generated:
        blocks = written_text(session, source, tokenizer, None)
    else:
        blocks = load_blocks(source, tokenizer, vocabulary_of(session.checkpoint, tokenizer))
    for warning in blocks.warnings:
        session.progress.warn(warning)
    return blocks


def report(*runs: StrPath, output: StrPath) -> Path:
    """One self-contained HTML page with tables and plots from results.

    Args:
        runs: JSON files that `table`, `throughput` or `evaluate ... --json` wrote, and folders that `quantize` wrote.
        output: the page to write; its path is returned.

    Raises UsageError without the extra [report], InputError for a run that is no result.
    """
    if not runs:
        raise UsageError("nothing to report: give a result of `evaluate`, or a quantized folder.")
    return write_page([str(run) for run in runs], Path(output))
