"""The `quantize` commands; `evaluate` stands in `turbomind_quant.cli.evaluate`. Flags in, one call of the library, tables out."""

import os
from typing import TYPE_CHECKING, TypedDict

import click

import turbomind_quant as tmq
from convert.errors import UNVERIFIED
from convert.formats import PACK_FORMATS
from turbomind_quant.cli.commands import HELP, Commands, debug_option, resumable, version_option
from turbomind_quant.cli.options import (
    CalibrateOptions,
    PresetHelp,
    QuantizeOptions,
    calibrate_options,
    dry_run_option,
    engine_option,
    family_option,
    json_option,
    quantize_options,
    restart_option,
    together,
)
from turbomind_quant.cli.printing import show

if TYPE_CHECKING:
    from typing import Literal

    from typing_extensions import Unpack

    from convert.formats import PackFormat

__all__ = ["quantize"]

model_argument = click.argument("model")
output_option = click.option(
    "-o", "--output", required=True, metavar="OUT", help="Folder to write; absent, empty or unfinished."
)
run_options = together(restart_option("OUT"), dry_run_option, json_option, debug_option)


class PackOptions(TypedDict):
    """All settings of `quantize pack`."""

    format: "PackFormat"
    tp: int
    dialect: "Literal['0.6.5', '0.1']"
    dtype: "Literal['float16', 'bfloat16'] | None"
    chat_template: str | None
    rest: "Literal['f16', 'q8_0']"
    family: str | None


@click.group(cls=Commands, context_settings=HELP)
@version_option
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
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        # tensors of many sizes come and go: memory that is held in fixed pieces would lie idle (3 to 5 GiB at 7B)
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


@quantize.command(short_help="Keep statistics of what every linear of MODEL reads.")
@model_argument
@output_option
@together(calibrate_options, run_options)
def calibrate(
    model: str,
    output: str,
    restart: bool,
    dry_run: bool,
    as_json: bool,
    **options: "Unpack[CalibrateOptions]",
) -> None:
    """Run text through MODEL and keep statistics of every linear's input.

    Writes Gram matrices, mean and maximum magnitudes and the ranges of K and V, one file a block. `quantize awq` calibrates by
    itself; this is for searching several times on one calibration (`quantize awq --preset fast --stats OUT`).

    \b
    Example:  quantize calibrate ./my-model -o stats --calib-data prose.txt --samples 64
    Next:     quantize awq ./my-model -o my-model-4bit --preset fast --stats stats
    """
    from turbomind_quant.cli.progress import shown_progress
    from turbomind_quant.cli.views.quantization import calibrate_view, estimate_view

    with resumable("quantize calibrate"), shown_progress() as progress:
        if dry_run:
            plan = tmq.estimate(model, output, command="calibrate", progress=progress, **options)
            return show(plan.to_json(), lambda: estimate_view(plan), as_json)
        result = tmq.calibrate(model, output, restart=restart, progress=progress, **options)
    show(result.to_json(), lambda: calibrate_view(model, result), as_json)


@quantize.command(cls=PresetHelp, short_help="Quantize MODEL to a 4-bit AWQ checkpoint.")
@model_argument
@output_option
@together(quantize_options, run_options)
def awq(
    model: str,
    output: str,
    restart: bool,
    dry_run: bool,
    as_json: bool,
    **options: "Unpack[QuantizeOptions]",
) -> None:
    """Quantize MODEL to an AWQ checkpoint that LMDeploy, vLLM and transformers load as it is.

    Works block by block, so that a model larger than memory goes through. Killed or interrupted anywhere, the same command
    goes on and ends in the same bytes.

    \b
    Presets, from quick to thorough:
      {presets}
    FILE.yaml is a recipe of your own: a preset with other settings, or with modules that stay float (docs/RECIPES.md). The
    tmq/manifest.json of an earlier result runs its recipe again.

    \b
    Example:  quantize awq ./my-model -o my-model-4bit --calib-data prose.txt
    Next:     evaluate ppl ./my-model my-model-4bit
              quantize pack my-model-4bit -o workspace
    """
    from turbomind_quant.cli.progress import shown_progress
    from turbomind_quant.cli.views.quantization import estimate_view, quantize_view

    with resumable("quantize awq"), shown_progress() as progress:
        if dry_run:
            plan = tmq.estimate(model, output, progress=progress, **options)
            return show(plan.to_json(), lambda: estimate_view(plan), as_json)
        result = tmq.quantize(model, output, restart=restart, progress=progress, **options)
    show(result.to_json(), lambda: quantize_view(model, result), as_json)


@quantize.command(short_help="Write a 4-bit checkpoint in another format: no number changes.")
@click.argument("path")
@output_option
@click.option(
    "--format",
    default="turbomind",
    show_default=True,
    type=click.Choice(PACK_FORMATS),
    help="What to write; docs/FORMATS.md says which engine reads which.",
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
    "--rest",
    default="f16",
    show_default=True,
    type=click.Choice(["f16", "q8_0"]),
    help="Of a GGUF file: the type of embedding and head.",
)
@together(family_option, restart_option("OUT"), dry_run_option, json_option, debug_option)
def pack(
    path: str,
    output: str,
    restart: bool,
    dry_run: bool,
    as_json: bool,
    **options: "Unpack[PackOptions]",
) -> None:
    """Write a 4-bit checkpoint in another format. Codes, scales and zero points are moved; none is chosen again.

    \b
    turbomind           a workspace for LMDeploy 0.6.4 to 0.7.3 (float models too); --tp, --dialect, --dtype, --chat-template
    awq                 what quantize awq writes, from any of the others
    compressed-tensors  vLLM, SGLang, LMDeploy of today, transformers
    gptq                transformers with GPT-QModel; vLLM, SGLang and LMDeploy where every zero point is 8 (--symmetric)
    gguf                llama.cpp: one .gguf file; --rest
    mlx                 mlx-lm
    float16             dequantized, for importers that read nothing else

    \b
    Example:  quantize pack my-model-4bit -o my-model-ct --format compressed-tensors
    Next:     quantize verify my-model-ct --source my-model-4bit
              evaluate ppl my-model-ct
    """
    from turbomind_quant.cli.progress import shown_progress
    from turbomind_quant.cli.views.formats import pack_estimate_view, pack_view

    if dry_run:
        plan = tmq.estimate_pack(path, output, **options)
        return show(plan.to_json(), lambda: pack_estimate_view(plan), as_json)
    with resumable("quantize pack"), shown_progress() as progress:
        result = tmq.pack(path, output, restart=restart, progress=progress, **options)
    show(result.to_json(), lambda: pack_view(path, options["format"], result), as_json)


@quantize.command(short_help="Turn a TurboMind workspace back into a checkpoint.")
@click.argument("workspace")
@output_option
@together(restart_option("OUT"), json_option, debug_option)
def unpack(workspace: str, output: str, restart: bool, as_json: bool) -> None:
    """Turn a TurboMind WORKSPACE of either dialect, ours or LMDeploy's, back into a checkpoint.

    An int4 one becomes an AWQ checkpoint, a float one a Hugging Face folder; no number changes.

    \b
    Example:  quantize unpack workspace -o my-model-4bit
    Next:     quantize verify workspace --source my-model-4bit
    """
    from turbomind_quant.cli.progress import shown_progress
    from turbomind_quant.cli.views.formats import unpack_view

    with resumable("quantize unpack"), shown_progress() as progress:
        result = tmq.unpack(workspace, output, restart=restart, progress=progress)
    show(result.to_json(), lambda: unpack_view(result), as_json)


@quantize.command(short_help="Check every byte of a checkpoint, workspace or statistics.")
@click.argument("path")
@click.option(
    "--source", metavar="MODEL", help="What PATH was made from: sampled weights are compared with it."
)
@click.option(
    "--strict", is_flag=True, help="Refuse every file that the manifest does not list, README.md too."
)
@together(family_option, json_option, debug_option)
def verify(path: str, source: str | None, strict: bool, family: str | None, as_json: bool) -> None:
    """Check every byte of a checkpoint, a workspace or statistics: sizes, digests, ranges, the tokenizer, and against the source.

    Exit code 0: every byte is as it was written. 3: a check fails. 6: all checks passed, but no manifest of ours says what the
    bytes should be (a folder of another program).

    \b
    Example:  quantize verify workspace --source my-model-4bit
    """
    from turbomind_quant.cli.progress import shown_progress
    from turbomind_quant.cli.views.formats import verify_view

    with shown_progress() as progress:
        report = tmq.verify(path, source=source, family=family, strict=strict, progress=progress)
    code = tmq.InputError.exit_code if not report.passed else 0 if report.verified else UNVERIFIED
    show(report.to_json(), lambda: verify_view(report), as_json, code)


@quantize.command(short_help="Show what PATH is: family, sizes, tensors, bits.")
@click.argument("path")
@engine_option
@click.option(
    "--tp", default=1, show_default=True, type=click.IntRange(min=1), help="GPUs that share it there."
)
@together(family_option, json_option, debug_option)
def inspect(path: str, engine: str | None, tp: int, family: str | None, as_json: bool) -> None:
    """Show what PATH is: family, sizes, tensors, bits; with --for, whether that engine loads it, and if not, what to do.

    Exit code 3 where it is listed but cannot be used, or the engine does not load it.

    \b
    Example:  quantize inspect ./my-model
              quantize inspect my-model-4bit --for lmdeploy:0.7.3 --tp 2
    """
    from turbomind_quant.cli.views.formats import inspect_view

    report = tmq.inspect(path, engine=engine, tp=tp, family=family)
    fails = report.verdict is not None and report.verdict.outcome == "fails"
    code = tmq.InputError.exit_code if fails or report.problem is not None else 0
    show(report.to_json(), lambda: inspect_view(report), as_json, code)
