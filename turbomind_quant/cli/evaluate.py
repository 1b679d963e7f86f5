"""The `evaluate` commands: perplexity, the table of methods, throughput, the report. Flags in, one call of the library, tables out."""

from typing import TYPE_CHECKING, TypedDict

import click

import turbomind_quant as tmq
from engine.config import KvMode
from quant.recipes import usual_methods
from turbomind_quant.cli.commands import HELP, Commands, debug_option, resumable, version_option
from turbomind_quant.cli.options import (
    CalibrateOptions,
    ModelOptions,
    calibrate_options,
    comma_list,
    json_option,
    model_options,
    rows_option,
    together,
    writable_file,
)
from turbomind_quant.cli.printing import show
from turbomind_quant.cli.throughput import throughput

if TYPE_CHECKING:
    from typing_extensions import Unpack

kl_option = click.option(
    "--kl-windows",
    default=32,
    show_default=True,
    type=click.IntRange(min=0),
    help="Windows on which KL and top-1 agreement with the first row are measured; 0: none.",
)
text_options = together(
    click.option(
        "--dataset",
        help="builtin (a sample that ships with us, the default) or wikitext2 (the published protocol).",
    ),
    click.option(
        "--text",
        metavar="FILE",
        help="A text file as it stands; beside --dataset wikitext2, the raw test split to take its rows from.",
    ),
    click.option("--windows", type=click.IntRange(min=1), help="Only the first N windows.  [default: all]"),
)


class TextOptions(TypedDict):
    """The text to judge by."""

    dataset: str | None
    text: str | None
    windows: int | None
    kl_windows: int


class PerplexityOptions(TextOptions, ModelOptions):
    """All settings of `evaluate ppl`."""

    seqlen: int | None
    kv_bits: int
    kv_mode: KvMode
    streamed: bool
    trust_remote_code: bool


class CompareOptions(TextOptions, ModelOptions):
    """All settings of `evaluate compare`."""

    seqlen: int | None
    places: int
    max_tokens: int
    trust_remote_code: bool


class TableOptions(TextOptions, CalibrateOptions):
    """All settings of `evaluate table`."""

    methods: tuple[str, ...]
    bits: tuple[int, ...]
    group_size: tuple[int, ...]
    kv_bits: tuple[str, ...]
    pad: bool
    peers: tuple[str, ...]
    output: str | None
    eval_seqlen: int | None


@click.group(cls=Commands, context_settings=HELP)
@version_option
@debug_option
def evaluate() -> None:
    """Measure what quantization cost: perplexity against fp16, and speed.

    \b
    First time?   evaluate ppl MODEL my-model-4bit
    All methods   evaluate table MODEL
    On a page     evaluate report results.json -o report.html

    Every PATH may be a checkpoint (float or AWQ), a .gguf file or a TurboMind workspace.
    """


@evaluate.command(short_help="Perplexity of models on the same text.")
@click.argument("paths", nargs=-1, required=True)
@together(text_options)
@click.option(
    "--seqlen", type=click.IntRange(min=2), help="Tokens a window.  [default: 2048, or the model's context]"
)
@kl_option
@click.option(
    "--kv-bits",
    type=click.Choice(["16", "8", "4"]),
    default="16",
    show_default=True,
    callback=lambda context, option, value: int(value),
    help="Simulate a KV cache of this width, exactly.",
)
@click.option(
    "--kv-mode",
    type=click.Choice(["dynamic", "static"]),
    default="dynamic",
    show_default=True,
    help="Scales a token, or those written by `quantize awq --kv-bits 8`.",
)
@click.option("--streamed", is_flag=True, help="Hold one block at a time, for models larger than memory.")
@click.option("--trust-remote-code", is_flag=True, help="Run a tokenizer that exists only as code in PATH.")
@together(model_options, json_option, debug_option)
def ppl(paths: tuple[str, ...], as_json: bool, **options: "Unpack[PerplexityOptions]") -> None:
    """Perplexity of one or more models on the same text; lower is better.

    The first PATH is the reference: the others' difference has a 95 % interval from the same windows, and KL divergence and
    top-1 agreement say how far their predictions moved.

    \b
    Example:  evaluate ppl ./my-model my-model-4bit
              evaluate ppl ./my-model my-model-4bit --dataset wikitext2 --kv-bits 8
    """
    from turbomind_quant.cli.progress import shown_progress
    from turbomind_quant.cli.views.evaluation import perplexity_view

    with shown_progress() as progress:
        report = tmq.perplexity(*paths, progress=progress, **options)
    show(report.to_json(), lambda: perplexity_view(report), as_json)


@evaluate.command(short_help="Where two models differ: perplexity, passages, texts.")
@click.argument("a")
@click.argument("b")
@together(text_options)
@click.option(
    "--seqlen", type=click.IntRange(min=2), help="Tokens a window.  [default: 2048, or the model's context]"
)
@kl_option
@click.option(
    "--places",
    default=5,
    show_default=True,
    type=click.IntRange(min=1),
    help="Passages where the two disagree most.",
)
@click.option(
    "--prompt",
    multiple=True,
    metavar="TEXT",
    help="A beginning that both go on with, greedily; repeatable.  [default: three of ours]",
)
@click.option(
    "--max-tokens", default=48, show_default=True, type=click.IntRange(min=1), help="Of such a text."
)
@click.option("--trust-remote-code", is_flag=True, help="Run a tokenizer that exists only as code in A or B.")
@together(model_options, json_option, debug_option)
def compare(
    a: str, b: str, prompt: tuple[str, ...], as_json: bool, **options: "Unpack[CompareOptions]"
) -> None:
    """Two models on the same text: their difference in perplexity, where they disagree most, and what either writes.

    A is the reference. The difference has a 95 % interval from the same windows; KL divergence and the passages come from the first
    --kl-windows of them.

    \b
    Example:  evaluate compare ./my-model my-model-4bit
    """
    from turbomind_quant.cli.progress import shown_progress
    from turbomind_quant.cli.views.evaluation import compare_view

    with shown_progress() as progress:
        if prompt:
            report = tmq.compare(a, b, prompt=prompt, progress=progress, **options)
        else:
            report = tmq.compare(a, b, progress=progress, **options)
    show(report.to_json(), lambda: compare_view(report), as_json)


@evaluate.command(short_help="The perplexity table of one MODEL, method by method.")
@click.argument("model")
@click.option(
    "--methods",
    default=lambda: ",".join(usual_methods()),
    show_default="fp16 and all presets but the slow ones",
    callback=comma_list(),
    help="Rows, joined by commas: fp16, the presets of `quantize awq` (recipe files too), and PRESET+distill.",
)
@click.option(
    "--bits", default="4,3", show_default=True, callback=comma_list(int), help="Widths, of 4, 3 and 2."
)
@click.option(
    "--group-size",
    "--group-sizes",
    "group_size",
    default="128",
    show_default=True,
    callback=comma_list(int),
    help="Groups, of 32, 64 and 128.",
)
@click.option(
    "--kv-bits",
    default="16",
    show_default=True,
    callback=comma_list(),
    help="Caches for every row: 16, 8, 4, 8:static.",
)
@kl_option
@click.option("--pad", is_flag=True, help="Zero-pad the model so that the group fits every linear.")
@click.option(
    "--peers",
    metavar="NAMES",
    default="",
    callback=comma_list(),
    help="Other quantizers, where installed, on the same blocks: llm-compressor (AWQ then GPTQ), llm-compressor-awq, "
    "llm-compressor-gptq, auto-round.",
)
@rows_option
@together(text_options)
@click.option(
    "--eval-seqlen",
    type=click.IntRange(min=2),
    help="Tokens a window of that text.  [default: 2048, or the context]",
)
@together(calibrate_options, json_option, debug_option)
def table(model: str, as_json: bool, **options: "Unpack[TableOptions]") -> None:
    """The perplexity table of one MODEL: float, RTN, GPTQ, AWQ and ours, at 4 and 3 bits.

    Every method reads the same calibration text and is judged on the same windows; nothing is written but -o FILE.

    \b
    Example:  evaluate table ./my-model --calib-data prose.txt --samples 64
    Next:     evaluate report table.json -o report.html
    """
    from turbomind_quant.cli.progress import shown_progress
    from turbomind_quant.cli.views.evaluation import table_view

    with (
        resumable("evaluate table", "the same command goes on behind the rows that it has"),
        shown_progress() as progress,
    ):
        report = tmq.table(model, progress=progress, **options)
    show(report.to_json(), lambda: table_view(report), as_json)


@evaluate.command(short_help="One page with tables and plots from results.")
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "-o", "--output", required=True, metavar="FILE", callback=writable_file, help="The page to write."
)
@together(debug_option)
def report(runs: tuple[str, ...], output: str) -> None:
    """One self-contained page with tables and plots from results: JSON files of `evaluate`, and quantized folders.

    \b
    Example:  evaluate report table.json my-model-4bit -o report.html
    """
    click.echo(str(tmq.report(*runs, output=output)))


evaluate.add_command(throughput)
