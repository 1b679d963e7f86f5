"""Flags that several commands share, with one name, one default and one type each. No torch here.

Beside each group of flags stands the `TypedDict` of its values, so that mypy compares what a command hands on with what the
library takes.
"""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import click
from click.shell_completion import CompletionItem

from convert.formats import CHECKPOINT_FORMATS, CheckpointFormat
from engine.config import Dtype
from quant import recipes
from quant.config import GROUP_SIZES, QuantConfig

F = TypeVar("F", bound=Callable[..., Any])


def defaults() -> dict[str, Any]:
    """Field -> default of `QuantConfig`, the one place where they are written."""
    return {field.name: field.default for field in fields(QuantConfig)}


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in this order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def config_option(name: str, help: str, **kwargs: Any) -> Callable[[F], F]:
    """A flag whose default is that of the field of `QuantConfig` with its name."""
    field = name.removeprefix("--").replace("-", "_")
    return click.option(name, field, default=defaults()[field], show_default=True, help=help, **kwargs)


class PresetType(click.ParamType):  # type: ignore[type-arg]
    """The name of a registered recipe, or a file that holds one."""

    name = "preset"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(recipes.names())}|FILE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from quant.recipe_file import is_recipe_file

        if value not in recipes.names() and not is_recipe_file(value):
            known = ", ".join(recipes.names())
            self.fail(f"{value!r} is not one of {known}, nor FILE.yaml or a manifest.json.", param, ctx)
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Names that begin so; the shell itself completes files where there is none."""
        names = [name for name in recipes.names() if name.startswith(incomplete)]
        return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


class PresetHelp(click.Command):
    """A command whose help has the table of presets in place of {presets}."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(name) for name in recipes.names())
        lines = [f"{row.name:<{width}}  {row.summary}" for row in recipes.rows()]
        text = self.help
        self.help = re.sub(
            r"^( *)\{presets\}",
            lambda found: "\n".join(found[1] + line for line in lines),
            text or "",
            flags=re.M,
        )
        try:
            super().format_help_text(ctx, formatter)
        finally:
            self.help = text


def none_unless_given(context: click.Context, option: click.Parameter, value: int) -> int | None:
    """Callback of a flag whose shown default may be lowered to what the model allows; a given value may not."""
    source = None if option.name is None else context.get_parameter_source(option.name)
    return None if source is None or source.name == "DEFAULT" else value


def comma_list(kind: Callable[[str], Any] = str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Callback of a flag that takes values separated by commas. Which values it takes is checked by the library."""

    def parse(context: click.Context, option: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        if value is None:
            return None
        parts = [part.strip() for part in value.split(",") if part.strip()]
        try:
            return tuple(kind(part) for part in parts)
        except ValueError as error:
            raise click.BadParameter(
                f"{value!r}: expected numbers separated by commas.", context, option
            ) from error

    return parse


def writable_file(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Callback of `-o FILE`: a place where no file can be is refused before the work, not after it."""
    if value is not None:
        if Path(value).is_dir():
            raise click.BadParameter(f"{value} is a folder: expected the name of a file.", context, parameter)
        if not Path(value).absolute().parent.is_dir():
            raise click.BadParameter(
                f"the folder of {value} does not exist: make it first.", context, parameter
            )
    return value


rows_option = click.option(
    "-o",
    "--output",
    metavar="FILE",
    callback=writable_file,
    help="Also write the rows to this JSON file, for `evaluate report`.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what it would take (memory, disk, sizes), and stop."
)


def restart_option(folder: str) -> Callable[[F], F]:
    """`--resume/--restart` of a command that writes a folder; its value is that of --restart."""
    return click.option(
        "--resume/--restart",
        "restart",
        default=True,
        callback=lambda context, option, value: not value,
        help=f"Resume an unfinished {folder} (the default), or discard it first.",
    )


class ModelOptions(TypedDict):
    """Where a model is run, in which type, and as what it is read."""

    device: str
    dtype: Dtype
    family: str | None


family_option = click.option("--family", help="Read the model as this family, whatever its config.json says.")
device_options: Callable[[Any], Any] = together(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "float16", "bfloat16", "float32"]),
        help="Of the forward passes. On the CPU it is float32.",
    ),
)
model_options: Callable[[Any], Any] = together(device_options, family_option)


class CalibrateOptions(ModelOptions):
    """Calibration text, and the model that reads it."""

    calib_data: str | None
    text_column: str
    samples: int
    seqlen: int | None
    seed: int
    allow_fewer: bool
    trust_remote_code: bool


text_options: Callable[[Any], Any] = together(
    click.option(
        "--calib-data",
        metavar="SOURCE",
        help="Calibration text: a txt, jsonl or parquet file, a folder, wikitext2, c4, pileval or a hub dataset. "
        "Left out, the model writes its own text: no file, no network.",
    ),
    click.option(
        "--text-column", default="text", show_default=True, help="Column of jsonl, parquet and hub datasets."
    ),
    config_option("--samples", "Samples of calibration text.", type=click.IntRange(min=1)),
    config_option(
        "--seqlen",
        "Tokens a sample (at most the model's context).",
        type=click.IntRange(min=1),
        callback=none_unless_given,
    ),
    config_option("--seed", "Same seed, same bytes.", type=click.IntRange(min=0)),
    click.option(
        "--allow-fewer", is_flag=True, help="Go on where the text holds fewer samples than asked for."
    ),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run a tokenizer that exists only as code in MODEL."
    ),
)
calibrate_options: Callable[[Any], Any] = together(text_options, model_options)


engine_option: Callable[[Any], Any] = click.option(
    "--for",
    "engine",
    metavar="ENGINE[:VERSION]",
    help="Will it load there? lmdeploy, vllm, sglang, transformers, llama.cpp or mlx.",
)


class QuantizeOptions(CalibrateOptions):
    """All settings of `quantize awq`."""

    engine: str | None
    format: CheckpointFormat
    preset: str
    bits: int
    group_size: int
    stats: str | None
    pad: bool
    keep_ragged: bool
    symmetric: bool
    kv_bits: int
    distill: bool


quantize_options: Callable[[Any], Any] = together(
    config_option("--preset", "How hard to search, see above; or a recipe of your own.", type=PresetType()),
    config_option("--bits", "4 to serve; 3 and 2 to evaluate.", type=click.IntRange(2, 4)),
    click.option(
        "--group-size",
        type=click.Choice([str(size) for size in GROUP_SIZES]),
        default=str(defaults()["group_size"]),
        show_default=True,
        callback=lambda context, option, value: int(value),
        help="Weights that share a scale.",
    ),
    click.option(
        "--stats",
        metavar="STATS",
        help="Statistics of `quantize calibrate`, in place of text "
        f"(--preset {' or '.join(recipes.names_on_statistics())} alone).",
    ),
    click.option(
        "--pad",
        is_flag=True,
        help="Zero-pad the model so that the group fits every linear: exactly the same function.",
    ),
    engine_option,
    click.option(
        "--format",
        default="awq",
        show_default=True,
        type=click.Choice(CHECKPOINT_FORMATS),
        help="Another than awq is packed from the AWQ checkpoint, which is made in the folder OUT-awq beside.",
    ),
    click.option("--keep-ragged", is_flag=True, help="Leave linears that the group does not fit in float16."),
    click.option(
        "--symmetric",
        is_flag=True,
        help="Every zero point is 8, for formats and engines that know no other (docs/FORMATS.md); costs some quality.",
    ),
    config_option(
        "--kv-bits",
        "8 also writes parameters for an int8 KV cache.",
        type=click.Choice(["16", "8"]),
        callback=lambda context, option, value: int(value),
    ),
    click.option(
        "--distill",
        is_flag=True,
        help="An end-to-end pass over scales and norms at the end: under a minute for 135M parameters on a GPU, hours on a CPU. "
        "The model must fit whole, in float32.",
    ),
    calibrate_options,
)
