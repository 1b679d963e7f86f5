"""The `evaluate` commands: perplexity, the table of methods, throughput, the report. Heavy imports wait inside."""

from pathlib import Path
from typing import Any

import click

from quant.cli import (
    Commands,
    debug_option,
    device_options,
    family_option,
    json_option,
    print_json,
    text_options,
    together,
)

METHODS = ("fp16", "rtn", "gptq", "gptq-r", "awq", "fast", "default", "best", "best+distill")
TABLE_METHODS = "fp16,rtn,gptq,gptq-r,awq,fast,default"

eval_text_options = together(
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


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@debug_option
def evaluate() -> None:
    """Measure what quantization cost: perplexity against fp16, and speed.

    \b
    First time?   evaluate ppl MODEL my-model-4bit
    All methods   evaluate table MODEL
    On a page     evaluate report results.json -o report.html

    Every PATH may be a checkpoint (float or AWQ), a .gguf file or a TurboMind workspace.
    """


@evaluate.command()
@click.argument("paths", nargs=-1, required=True)
@together(eval_text_options)
@click.option(
    "--seqlen", type=click.IntRange(min=2), help="Tokens a window.  [default: 2048, or the model's context]"
)
@click.option(
    "--kl-windows",
    default=32,
    show_default=True,
    type=click.IntRange(min=0),
    help="Windows on which KL and top-1 agreement with the first PATH are measured; 0: none.",
)
@click.option(
    "--kv-bits",
    type=click.Choice(["16", "8", "4"]),
    default="16",
    show_default=True,
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
@together(device_options, family_option, json_option, debug_option)
def ppl(paths: tuple[str, ...], **flags: Any) -> None:
    """Perplexity of one or more models on the same text; lower is better.

    The first PATH is the reference: the others' difference has a 95 % interval from the same windows, and KL divergence and
    top-1 agreement say how far their predictions moved.

    \b
    Example:  evaluate ppl ./my-model my-model-4bit
              evaluate ppl ./my-model my-model-4bit --dataset wikitext2 --kv-bits 8
    """
    from quant.evaluate_actions import run_ppl

    flags["kv_bits"] = int(flags["kv_bits"])
    outcome = run_ppl(paths, flags)
    print_json(outcome.document) if flags["as_json"] else outcome.show()


@evaluate.command()
@click.argument("model")
@click.option("--methods", default=TABLE_METHODS, show_default=True, help=f"Rows, of {', '.join(METHODS)}.")
@click.option("--bits", default="4,3", show_default=True, help="Widths, of 4, 3 and 2.")
@click.option(
    "--group-size",
    "--group-sizes",
    "groups",
    default="128",
    show_default=True,
    help="Groups, of 32, 64 and 128.",
)
@click.option("--kv-bits", default="16", show_default=True, help="Caches for every row: 16, 8, 4, 8:static.")
@click.option(
    "--kl-windows",
    default=32,
    show_default=True,
    type=click.IntRange(min=0),
    help="Windows for KL and top-1 agreement.",
)
@click.option("--pad", is_flag=True, help="Zero-pad the model so that the group fits every linear.")
@click.option(
    "-o", "--output", metavar="FILE", help="Also write the rows to this JSON file, for `evaluate report`."
)
@together(eval_text_options)
@click.option(
    "--eval-seqlen",
    "window",
    type=click.IntRange(min=2),
    help="Tokens a window of that text.  [default: 2048, or the context]",
)
@together(text_options, device_options, family_option, json_option, debug_option)
def table(model: str, **flags: Any) -> None:
    """The perplexity table of one MODEL: float, RTN, GPTQ, AWQ and ours, at 4 and 3 bits.

    Every method reads the same calibration text and is judged on the same windows; nothing is written but -o FILE.

    \b
    Example:  evaluate table ./my-model --calib-data prose.txt --samples 64
    Next:     evaluate report table.json -o report.html
    """
    from quant.evaluate_actions import run_table

    outcome = run_table(model, flags)
    print_json(outcome.document) if flags["as_json"] else outcome.show()


@evaluate.command()
@click.argument("paths", nargs=-1, required=True)
@click.option("--batch", default="1,8,32", show_default=True, help="Sequences at once.")
@click.option(
    "--input-len", default=512, show_default=True, type=click.IntRange(min=1), help="Tokens of a prompt."
)
@click.option(
    "--output-len",
    default=128,
    show_default=True,
    type=click.IntRange(min=2),
    help="Tokens written for each.",
)
@click.option(
    "--kv-bits",
    type=click.Choice(["16", "8"]),
    default="16",
    show_default=True,
    help="Width of the KV cache.",
)
@click.option(
    "--kv-mode",
    type=click.Choice(["dynamic", "static"]),
    default="dynamic",
    show_default=True,
    help="Of an int8 cache.",
)
@click.option(
    "-o", "--output", metavar="FILE", help="Also write the rows to this JSON file, for `evaluate report`."
)
@together(device_options, json_option, debug_option)
def throughput(paths: tuple[str, ...], **flags: Any) -> None:
    """Speed of one or more models: prefill and decode at several batch sizes, and their share of the hardware's limit.

    \b
    Example:  evaluate throughput ./my-model my-model-4bit --batch 1,16
    """
    from quant.evaluate_actions import run_throughput

    flags["kv_bits"] = int(flags["kv_bits"])
    outcome = run_throughput(paths, flags)
    print_json(outcome.document) if flags["as_json"] else outcome.show()


@evaluate.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("-o", "--output", required=True, metavar="FILE", help="The page to write.")
@together(debug_option)
def report(runs: tuple[str, ...], output: str) -> None:
    """One self-contained page with tables and plots from results: JSON files of `evaluate`, and quantized folders.

    \b
    Example:  evaluate report table.json my-model-4bit -o report.html
    """
    from quant.page import write_page

    path = write_page(runs, Path(output))
    click.echo(str(path))
