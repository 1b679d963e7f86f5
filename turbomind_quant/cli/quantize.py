"""The `quantize` commands; `evaluate` stands in `turbomind_quant.cli.evaluate`. Flags in, calls out: heavy imports wait inside."""

from pathlib import Path
from typing import Any

import click

from quant.config import QuantConfig
from turbomind_quant.cli.options import (
    Commands,
    PresetHelp,
    config_option,
    debug_option,
    device_options,
    family_option,
    json_option,
    print_json,
    quant_options,
    resumable,
    run_options,
    text_options,
    together,
)

__all__ = ["quantize"]

model_argument = click.argument("model")
output_option = click.option(
    "-o", "--output", required=True, metavar="OUT", help="Folder to write; absent, empty or unfinished."
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@debug_option
def quantize() -> None:
    """Turn a language model into a 4-bit one that serves, and know what it cost.

    \b
    First time?   quantize awq MODEL -o my-model-4bit
    then          evaluate ppl MODEL my-model-4bit       what it cost in perplexity
                  quantize pack my-model-4bit -o ws      for TurboMind (LMDeploy)
                  tmq chat my-model-4bit                 talk to it

    MODEL is a folder of safetensors, a .gguf file, or a Hugging Face name (fetched only when named).
    """


@quantize.command(short_help="Keep statistics of what every linear of MODEL reads.")
@model_argument
@output_option
@together(text_options, device_options, run_options, family_option, json_option, debug_option)
def calibrate(model: str, output: str, **flags: Any) -> None:
    """Run text through MODEL and keep statistics of every linear's input.

    Writes Gram matrices, mean and maximum magnitudes and the ranges of K and V, one file a block. `quantize awq` calibrates by
    itself; this is for searching several times on one calibration (`quantize awq --preset fast --stats OUT`).

    \b
    Example:  quantize calibrate ./my-model -o stats --calib-data prose.txt --samples 64
    Next:     quantize awq ./my-model -o my-model-4bit --preset fast --stats stats
    """
    from turbomind_quant.cli.quantize_actions import run_calibrate

    config = QuantConfig(samples=flags["samples"], seqlen=flags["seqlen"], seed=flags["seed"])
    with resumable("quantize calibrate"):
        outcome = run_calibrate(model, Path(output), config, flags, is_typed("seqlen"))
    finish(outcome, flags["as_json"])


@quantize.command(cls=PresetHelp, short_help="Quantize MODEL to a 4-bit AWQ checkpoint.")
@model_argument
@output_option
@together(quant_options)
@click.option(
    "--stats",
    metavar="STATS",
    help="Statistics of `quantize calibrate`, in place of text (--preset fast alone).",
)
@click.option(
    "--pad",
    is_flag=True,
    help="Zero-pad the model so that the group fits every linear: exactly the same function.",
)
@click.option("--keep-ragged", is_flag=True, help="Leave linears that the group does not fit in float16.")
@config_option(
    "--kv-bits",
    "8 also writes parameters for an int8 KV cache.",
    type=click.Choice(["16", "8"]),
    callback=lambda c, o, v: int(v),
)
@click.option(
    "--distill",
    is_flag=True,
    help="An end-to-end pass over scales and norms at the end: under a minute for 135M parameters on a GPU, hours on a CPU. "
    "The model must fit whole, in float32.",
)
@together(text_options, device_options, run_options, family_option, json_option, debug_option)
def awq(model: str, output: str, **flags: Any) -> None:
    """Quantize MODEL to an AWQ checkpoint that LMDeploy, vLLM and transformers load as it is.

    Works block by block, so that a model larger than memory goes through. Killed or interrupted anywhere, the same command
    goes on and ends in the same bytes.

    \b
    Presets, from quick to thorough:
      {presets}

    \b
    Example:  quantize awq ./my-model -o my-model-4bit --calib-data prose.txt
    Next:     evaluate ppl ./my-model my-model-4bit
              quantize pack my-model-4bit -o workspace
    """
    from turbomind_quant.cli.quantize_actions import run_awq

    names = ("preset", "bits", "group_size", "samples", "seqlen", "seed", "kv_bits", "distill", "keep_ragged")
    config = QuantConfig(**{name: flags[name] for name in names})
    with resumable("quantize awq"):
        outcome = run_awq(model, Path(output), config, flags, is_typed("seqlen"), typed_names())
    finish(outcome, flags["as_json"])


@quantize.command(short_help="Pack a checkpoint into a TurboMind workspace.")
@click.argument("path")
@click.option(
    "-o", "--output", required=True, metavar="WORKSPACE", help="Folder to write; absent, empty or unfinished."
)
@click.option(
    "--tp", default=1, show_default=True, type=click.IntRange(min=1), help="GPUs that will share the model."
)
@click.option(
    "--dialect",
    default="0.6.5",
    show_default=True,
    type=click.Choice(["0.6.5", "0.1"]),
    help="TurboMind's format.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16"]),
    help="Of a float model's weights; left out, that of the source (int4 models: float16).",
)
@click.option(
    "--chat-template",
    metavar="NAME",
    help="LMDeploy's name of the chat format (llama3, qwen, ...); left out, it is found in the tokenizer's template.",
)
@click.option(
    "--resume/--restart",
    default=True,
    help="Resume an unfinished WORKSPACE (the default), or discard it first.",
)
@click.option("--dry-run", is_flag=True, help="Say what it would take, and stop.")
@together(family_option, json_option, debug_option)
def pack(path: str, output: str, **flags: Any) -> None:
    """Pack an AWQ or fp16 checkpoint into a TurboMind workspace, which LMDeploy serves.

    \b
    Example:  quantize pack my-model-4bit -o workspace --tp 1
    Next:     quantize verify workspace --source my-model-4bit
              evaluate ppl workspace
    """
    from turbomind_quant.cli.format_actions import run_pack

    with resumable("quantize pack"):
        outcome = run_pack(path, Path(output), flags)
    finish(outcome, flags["as_json"])


@quantize.command(short_help="Turn a TurboMind workspace back into a checkpoint.")
@click.argument("workspace")
@output_option
@click.option(
    "--resume/--restart", default=True, help="Resume an unfinished OUT (the default), or discard it first."
)
@together(json_option, debug_option)
def unpack(workspace: str, output: str, **flags: Any) -> None:
    """Turn a TurboMind WORKSPACE of either dialect, ours or LMDeploy's, back into a checkpoint.

    An int4 one becomes an AWQ checkpoint, a float one a Hugging Face folder; no number changes.

    \b
    Example:  quantize unpack workspace -o my-model-4bit
    Next:     quantize verify workspace --source my-model-4bit
    """
    from turbomind_quant.cli.format_actions import run_unpack

    with resumable("quantize unpack"):
        outcome = run_unpack(workspace, Path(output), flags)
    finish(outcome, flags["as_json"])


@quantize.command(short_help="Check every byte of a checkpoint, workspace or statistics.")
@click.argument("path")
@click.option(
    "--source", metavar="MODEL", help="What PATH was made from: sampled weights are compared with it."
)
@together(family_option, json_option, debug_option)
def verify(path: str, **flags: Any) -> None:
    """Check every byte of a checkpoint, a workspace or statistics: sizes, digests, ranges, the tokenizer, and against the source.

    \b
    Example:  quantize verify workspace --source my-model-4bit
    """
    from turbomind_quant.cli.format_actions import run_verify

    finish(run_verify(path, flags), flags["as_json"])


@quantize.command(short_help="Show what PATH is: family, sizes, tensors, bits.")
@click.argument("path")
@together(family_option, json_option, debug_option)
def inspect(path: str, **flags: Any) -> None:
    """Show what PATH is: family, sizes, tensors, bits. Any checkpoint, .gguf file or workspace.

    \b
    Example:  quantize inspect ./my-model
    """
    from turbomind_quant.cli.format_actions import run_inspect

    finish(run_inspect(path, flags), flags["as_json"])


def is_typed(name: str) -> bool:
    """Whether the user typed this flag (the default of --seqlen is lowered to the model's context, a typed value is not)."""
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def typed_names() -> set[str]:
    """The parameters that the user typed."""
    return {name for name in click.get_current_context().params if is_typed(name)}


def finish(outcome: Any, as_json: bool) -> None:
    """Show the result on stdout; a failed check ends with the code of bad input."""
    if as_json:
        print_json(outcome.document)
    else:
        outcome.show()
    if outcome.exit_code:
        click.get_current_context().exit(outcome.exit_code)
