"""What commands say beside their results: a missing extra, a wait, where the server is. No torch here."""

from importlib.util import find_spec
from typing import Any

import click

from convert.errors import InputError
from serve.config import ServeConfig
from turbomind_quant.cli.serve_options import KEY_VARIABLE


def need(extra: str, *modules: str) -> None:
    """InputError naming the extra whose packages are absent."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} is not installed: this command needs the extra [{extra}]. "
            f"pip install 'turbomind-quant[{extra}]'"
        )


def waiting(text: str) -> Any:
    """A spinner on stderr where that is a terminal, one line where it is not."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.print(escape(text))
    return console.status(escape(text))


def announce(config: ServeConfig) -> None:
    if not config.is_loopback and not config.api_keys:
        click.echo(
            f"warning: {config.server_name} can be reached from other machines and there is no API key: anyone there can use "
            f"the model. Set {KEY_VARIABLE} or --api-key-file.",
            err=True,
        )
    click.echo(
        f"{config.model_name} is served at {config.base_url}\n"
        f"  how to call it   {config.base_url}/\n"
        f"  in the terminal  tmq client {config.base_url}\n"
        "  to end           Ctrl-C",
        err=True,
    )
