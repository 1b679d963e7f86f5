"""`table` and `report`: what every method costs on one model, and results on one page."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import fspath
from pathlib import Path
from typing import Any

from calib_data.blocks import CalibrationSet
from convert.errors import UsageError
from convert.folder.files import write_json
from convert.tokenizer.tokenizer import Tokenizer
from engine.config import Dtype
from quant.config import BITS, GROUP_SIZES, QuantConfig
from quant.estimate import refuse_ragged
from quant.evaluation.kept_rows import KeptRows
from quant.evaluation.page import write_page
from quant.evaluation.peers import check_peers
from quant.evaluation.perplexity import (
    EvalProtocol,
    EvalText,
    load_eval_text,
    tokens_of,
)
from quant.evaluation.table import Row, TableRequest, evaluate_table, needs_ranges
from quant.progress import Listener, Progress
from quant.recipe_file import find_recipe
from quant.recipes import Recipe, usual_methods
from quant.recipes import methods as known_methods
from quant.session import Session, fit_seqlen
from quant.text.calibration import calibration_text
from turbomind_quant.api.choices import StrPath, chosen
from turbomind_quant.api.perplexity import check_windows
from turbomind_quant.api.preparation import ModelChoice, TextChoice

CACHES = ("16", "8", "4", "8:dynamic", "8:static", "4:dynamic", "4:static")


@dataclass(frozen=True)
class TableReport:
    """Methods judged on one model. `calibration`: where the text came from; None where no method read any."""

    rows: tuple[Row, ...]
    calibration: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return {"calibration": self.calibration, "rows": [row.to_json() for row in self.rows]}


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
    calib_data: StrPath | None = None,
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
        methods: rows: "fp16", presets, a preset with "+distill", files of recipes, or recipes; None: all but the slow ones.
        bits, group_size: every method has a row for each. kv_bits: caches for every row, of "16", "8", "4", "8:static" and "4:static".
        kl_windows: windows for KL divergence and top-1 agreement with the float model; 0: none.
        pad: zero-pad the model exactly, so that the group fits every linear. peers: other quantizers, where installed, on the same text.
        output: also write the rows to this JSON file, for `report`.
        dataset, text, windows: as in `perplexity`. eval_seqlen: tokens of a window of that text.
        The calibration text (`calib_data` to `trust_remote_code`), device, dtype, family and progress: as in `quantize`.

    A run that is interrupted keeps its finished rows in the cache folder; the same call goes on behind them.

    Raises UsageError for choices that contradict each other, InputError for a model or text that cannot be used.
    """
    check_windows(windows, kl_windows)
    choice = TextChoice(calib_data, text_column, samples, seqlen, seed, allow_fewer, trust_remote_code)
    groups = chosen(group_size, "--group-size", GROUP_SIZES)
    wanted = TableRequest(
        base=choice.config(),
        methods=_methods(usual_methods() if methods is None else methods),
        bits=chosen(bits, "--bits", BITS),
        group_sizes=groups,
        kv=tuple(_cache(name) for name in chosen(kv_bits, "--kv-bits", CACHES)),
        protocol=EvalProtocol(eval_seqlen, windows, kl_windows),
    )
    words = load_eval_text(dataset, None if text is None else fspath(text))
    with Progress("evaluate table", progress) as run:
        session = ModelChoice(model, device, dtype, family).open(run, pad_to=max(groups) if pad else None)
        request = replace(wanted, peers=_usable_peers(peers, pad, session))
        result = _filled_table(session, Path(model).name, request, choice, words)
    if output is not None:
        write_json(Path(output), {"kind": "table", **result.to_json()})
    return result


def _filled_table(
    session: Session, name: str, request: TableRequest, choice: TextChoice, words: EvalText
) -> TableReport:
    """Every row, made and judged. `name`: of the model in the rows."""
    base = fit_seqlen(request.base, session.config, choice.seqlen is not None)
    request = replace(request, base=base)
    for arm in request.arms():
        if arm is not None:
            refuse_ragged(session.config, arm)
    tokenizer = choice.tokenizer(session)
    tokens = tokens_of(words, tokenizer, session.checkpoint)
    text = _calibration_text(request, choice, session, tokenizer)
    kept = KeptRows(session, request.protocol, tokens, text)
    rows = evaluate_table(session, name, request, text, tokens, kept)
    return TableReport(tuple(rows), None if text is None else text.provenance)


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
    return calibration_text(session, choice.request(request.base), tokenizer)


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
