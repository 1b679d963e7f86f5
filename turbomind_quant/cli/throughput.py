"""`evaluate throughput`: flags in, one call of the library, a table out."""

from typing import TYPE_CHECKING

import click

import turbomind_quant as tmq
from engine.config import KvMode
from turbomind_quant.cli.commands import debug_option
from turbomind_quant.cli.options import (
    ModelOptions,
    comma_list,
    json_option,
    model_options,
    rows_option,
    together,
)
from turbomind_quant.cli.printing import show

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ThroughputOptions(ModelOptions):
    """All settings of `evaluate throughput`, but the random model."""

    batch: tuple[int, ...] | None
    input_len: int
    output_len: int
    trace: str | None
    requests: int | None
    rate: float | None
    max_batch: int
    seed: int
    kv_bits: tuple[int, ...]
    kv_mode: KvMode
    context_len: int | None
    weights: tuple[str, ...]
    group_size: int
    memory_cap: float | None
    tp: int
    output: str | None


def _batches(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """ "1,8,32" or "none"."""
    if value is not None and value.strip() == "none":
        return ()
    parsed: tuple[int, ...] | None = comma_list(int)(context, option, value)
    if parsed == ():
        raise click.BadParameter("expected numbers of sequences separated by commas, or none.")
    return parsed


@click.command(short_help="Speed and memory of models in one run.")
@click.argument("paths", nargs=-1)
@click.option(
    "--batch",
    metavar="LIST",
    callback=_batches,
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
    "--kv-bits",
    default="16",
    show_default=True,
    callback=comma_list(int),
    help="Widths of the KV cache, as 16,8: one after the other.",
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
    "--weights",
    default="fp16,int4",
    show_default=True,
    callback=comma_list(),
    help="Of --random-weights: fp16, int4 or both.",
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
@rows_option
@together(model_options, json_option, debug_option)
def throughput(
    paths: tuple[str, ...],
    random_weights: str | None,
    as_json: bool,
    **options: "Unpack[ThroughputOptions]",
) -> None:
    """Speed and memory of one or more models in one run, each with every width of KV cache asked for.

    Static: prefill and decode of a fixed batch. Dynamic: a trace of requests that arrive by the clock: requests and tokens a
    second, time to first token, latency between tokens. Prompts are random tokens. What does not fit is named and passed by.

    \b
    Example:  evaluate throughput ./my-model my-model-4bit --batch 1,16 --kv-bits 16,8
              evaluate throughput my-model-4bit --rate 4 --requests 200
              evaluate throughput --random-weights 7b --kv-bits 16,8 --memory-cap 24
    """
    from turbomind_quant.cli.progress import shown_progress
    from turbomind_quant.cli.views.throughput import throughput_view

    with shown_progress() as progress:
        report = tmq.throughput(*paths, random_weights=random_weights, progress=progress, **options)
    is_random = random_weights is not None
    code = 0 if report.rows else tmq.ResourceError.exit_code
    show(report.to_json(), lambda: throughput_view(report, is_random), as_json, code)
