"""What all commands share: exit codes, one message for a mistake, Ctrl-C, flags with one name and one default. No torch here."""

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from convert.errors import InterruptedRunError, TmqError
from quant import recipes
from quant.config import GROUP_SIZES, QuantConfig

F = TypeVar("F", bound=Callable[..., Any])
BUG = 70
INTERRUPTED = 5
_DEVICE_ERRORS = {  # (package, class): known by name, so that this module does not import torch
    (
        "torch",
        "OutOfMemoryError",
    ): "the GPU's memory is used up. Use a smaller batch or --seqlen, an int4 checkpoint, or --device cpu",
    (
        "torch",
        "AcceleratorError",
    ): "the GPU reported an error that it does not recover from: look at `nvidia-smi` and the system's "
    "log, then give the same command again",
    (
        "triton",
        "TritonError",
    ): "a GPU kernel could not be compiled for this device: try another release of triton or the driver, or "
    "--device cpu",
}


class Commands(click.Group):
    """A group that ends every error in one message and the exit code of its kind; `--debug` shows the traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        sys.exit(self._guarded(list(sys.argv[1:] if args is None else args), prog_name, complete_var, extra))

    def _guarded(
        self, arguments: list[str], prog_name: str | None, complete_var: str | None, extra: dict[str, Any]
    ) -> int:
        output = sys.stdout
        try:
            code = super().main(arguments, prog_name, complete_var, False, **extra)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except (
            BrokenPipeError
        ):  # the reader of our output has left: the work is done, only its listing is cut
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except SystemExit as leaving:  # click's own way out of the same, after it has muffled stdout
            return int(leaving.code or 0) if sys.stdout is output else 0
        except (click.Abort, KeyboardInterrupt):
            click.echo("\ninterrupted; give the same command again", err=True)
            return INTERRUPTED
        except Exception as error:
            code, text = describe(error)
            if "--debug" in arguments:
                traceback.print_exc()
            click.echo(f"error: {text}", err=True)
            return code


def describe(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error that reached the command line."""
    if isinstance(error, TmqError):
        return error.exit_code, str(error)
    if isinstance(error, MemoryError):
        return (
            4,
            "the memory of this machine is used up. Use fewer --samples or a smaller --seqlen, or a larger machine.",
        )
    for kind, advice in _DEVICE_ERRORS.items():
        if any(
            cls.__module__.partition(".")[0] == kind[0] and cls.__name__ == kind[1]
            for cls in type(error).__mro__
        ):
            reason = (str(error).splitlines() or [""])[0]
            return 4, f"{advice} ({reason})"
    return (
        BUG,
        f"{type(error).__name__}: {error}\nThis is a fault of the program, not of your input; --debug shows where.",
    )


@contextmanager
def resumable(title: str) -> Iterator[None]:
    """Turns Ctrl-C, SIGTERM and SIGHUP into the error that says how to resume. A second signal ends the process at once."""
    received = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received > 1:
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            f"{title} was interrupted. What is finished is kept: the same command resumes, --restart begins anew."
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    """The name of a registered recipe."""

    name = "preset"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(recipes.names())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in recipes.names():
            self.fail(f"{value!r} is not one of {', '.join(recipes.names())}.", param, ctx)
        return value


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


debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
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
    config_option("--seqlen", "Tokens a sample (at most the model's context).", type=click.IntRange(min=1)),
    config_option("--seed", "Same seed, same bytes.", type=click.IntRange(min=0)),
    click.option(
        "--allow-fewer", is_flag=True, help="Go on where the text holds fewer samples than asked for."
    ),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run a tokenizer that exists only as code in MODEL."
    ),
)
run_options: Callable[[Any], Any] = together(
    click.option(
        "--resume/--restart",
        default=True,
        help="Resume an unfinished OUT (the default), or discard it first.",
    ),
    click.option("--dry-run", is_flag=True, help="Say what it would take (memory, disk, sizes), and stop."),
)
quant_options: Callable[[Any], Any] = together(
    config_option("--preset", "How hard to search; see above.", type=PresetType()),
    config_option("--bits", "4 to serve; 3 and 2 to evaluate.", type=click.IntRange(2, 4)),
    click.option(
        "--group-size",
        type=click.Choice([str(size) for size in GROUP_SIZES]),
        default=str(defaults()["group_size"]),
        show_default=True,
        callback=lambda context, option, value: int(value),
        help="Weights that share a scale.",
    ),
)


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


def print_json(value: Any) -> None:
    """One JSON document on stdout. Numbers that are not finite become null."""
    click.echo(json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """The same value with NaN and infinities as None, tuples as lists."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value
