"""The `evaluate` commands: perplexity, the table of methods, throughput, the report. Heavy imports wait inside."""

from pathlib import Path
from typing import Any

import click

from quant.recipes import usual_methods
from turbomind_quant.cli.options import (
    Commands,
    debug_option,
    device_options,
    family_option,
    json_option,
    print_json,
    text_options,
    together,
    writable_file,
)

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


@evaluate.command(short_help="Perplexity of models on the same text.")
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
    from turbomind_quant.cli.evaluate_actions import run_ppl

    flags["kv_bits"] = int(flags["kv_bits"])
    outcome = run_ppl(paths, flags)
    print_json(outcome.document) if flags["as_json"] else outcome.show()


@evaluate.command(short_help="The perplexity table of one MODEL, method by method.")
@click.argument("model")
@click.option(
    "--methods",
    default=lambda: ",".join(usual_methods()),
    show_default="fp16 and all presets but the slow ones",
    help="Rows, joined by commas: fp16, the presets of `quantize awq`, and PRESET+distill.",
)
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
    "--peers",
    metavar="NAMES",
    help="Other quantizers, where installed, on the same blocks: llm-compressor (AWQ then GPTQ), llm-compressor-awq, "
    "llm-compressor-gptq, auto-round.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    callback=writable_file,
    help="Also write the rows to this JSON file, for `evaluate report`.",
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
    from turbomind_quant.cli.evaluate_actions import run_table

    outcome = run_table(model, flags)
    print_json(outcome.document) if flags["as_json"] else outcome.show()


@evaluate.command(short_help="Speed and memory of models in one run.")
@click.argument("paths", nargs=-1)
@click.option(
    "--batch",
    metavar="LIST",
    help="Static: sequences at once, as 1,8,32; none leaves it out.  [default: 1,8,32; none where a dynamic flag is given]",
)
@click.option(
    "--input-len",
    default=512,
    show_default=True,
    type=click.IntRange(min=1),
    help="Static: tokens of a prompt.",
)
@click.option(
    "--output-len",
    default=128,
    show_default=True,
    type=click.IntRange(min=2),
    help="Static: decoded steps, of which the median counts.",
)
@click.option(
    "--trace",
    metavar="FILE",
    help="Dynamic: requests from JSON lines with arrival_s, prompt_tokens, output_tokens.  [default: a generated trace]",
)
@click.option(
    "--requests", type=click.IntRange(min=1), help="Dynamic: only so many.  [default: all; 100 generated]"
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    help="Dynamic: requests a second, Poisson arrivals.  [default: 1]",
)
@click.option(
    "--max-batch",
    default=128,
    show_default=True,
    type=click.IntRange(min=1),
    help="Dynamic: sequences that run at once.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of prompts and trace."
)
@click.option(
    "--kv-bits", default="16", show_default=True, help="Widths of the KV cache, as 16,8: one after the other."
)
@click.option(
    "--kv-mode",
    type=click.Choice(["dynamic", "static"]),
    default="dynamic",
    show_default=True,
    help="Of an int8 cache.",
)
@click.option(
    "--context-len", type=click.IntRange(min=1), help="Tokens a sequence may have.  [default: the model's]"
)
@click.option(
    "--random-weights",
    metavar="CONFIG",
    help="Also a model of random weights, made on the device: 7b, 13b, 70b or a config.json.",
)
@click.option(
    "--weights", default="fp16,int4", show_default=True, help="Of --random-weights: fp16, int4 or both."
)
@click.option(
    "--group-size", default=128, show_default=True, type=click.IntRange(min=1), help="Of random int4 weights."
)
@click.option(
    "--memory-cap",
    metavar="GiB",
    type=click.FloatRange(0, min_open=True),
    help="Allocate no more than that on a GPU.",
)
@click.option("--tp", default=1, show_default=True, type=click.IntRange(min=1), help="GPUs to split over.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    callback=writable_file,
    help="Also write the rows to this JSON file, for `evaluate report`.",
)
@together(device_options, family_option, json_option, debug_option)
def throughput(paths: tuple[str, ...], **flags: Any) -> int:
    """Speed and memory of one or more models in one run, each with every width of KV cache asked for.

    Static: prefill and decode of a fixed batch. Dynamic: a trace of requests that arrive by the clock: requests and tokens a
    second, time to first token, latency between tokens. Prompts are random tokens. What does not fit is named and passed by.

    \b
    Example:  evaluate throughput ./my-model my-model-4bit --batch 1,16 --kv-bits 16,8
              evaluate throughput my-model-4bit --rate 4 --requests 200
              evaluate throughput --random-weights 7b --kv-bits 16,8 --memory-cap 24
    """
    from turbomind_quant.cli.throughput_action import run_throughput

    outcome = run_throughput(paths, flags)
    print_json(outcome.document) if flags["as_json"] else outcome.show()
    return outcome.exit_code


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
    from quant.evaluation.page import write_page

    path = write_page(runs, Path(output))
    click.echo(str(path))
