"""What all commands share: exit codes, one message for a mistake, hints at near names, Ctrl-C. No torch here."""

import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import click

from convert.errors import InterruptedRunError, TmqError
from convert.folder.processors import choose_threads

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
        choose_threads(os.environ)  # before torch is imported: it reads them then
        sys.exit(self._guarded(list(sys.argv[1:] if args is None else args), prog_name, complete_var, extra))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Also names the commands that are near a mistyped one, those of other packages included."""
        name = args[0]
        if not name.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            near = [repr(known) for known in difflib.get_close_matches(name, self.list_commands(ctx))]
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(f"No such command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

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
def resumable(title: str, advice: str = "the same command resumes, --restart begins anew") -> Iterator[None]:
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
        raise InterruptedRunError(f"{title} was interrupted. What is finished is kept: {advice}.") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


HELP = {"help_option_names": ["-h", "--help"]}
debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")


def version_option(group: F) -> F:
    """`--version`, with the name of the command that was called. click keeps that name, so each group has an option of its own."""
    return click.version_option(package_name="turbomind-quant")(group)
