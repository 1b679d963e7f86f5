"""The `tmq` command: chat, serve, client, web and doctor; `quantize` and `evaluate` hang below it, loaded when called.

Flags in, calls out. Defaults come from ServeConfig, Limits, ChatSettings and EngineConfig; heavy imports wait inside.
"""

import asyncio
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convert.errors import InputError, UsageError
from quant.cli import Commands, debug_option, json_option, print_json, together
from serve.config import ServeConfig
from serve.limits import Limits
from serve.options import (
    KEY_VARIABLE,
    SETTINGS,
    chat_settings,
    client_key,
    engine_config,
    engine_options,
    history_file,
    key_file_option,
    sampling_options,
)

if TYPE_CHECKING:
    from serve.backends import Backend

_LAZY = {
    "quantize": (
        "quant.commands",
        "quantize",
        "Turn a model into a 4-bit one: calibrate, awq, pack, verify, inspect.",
    ),
    "evaluate": ("quant.commands", "evaluate", "Measure perplexity and throughput, and report."),
}


class _Umbrella(Commands):
    """A group that lists the commands of other packages without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_LAZY, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _LAZY:
            return super().get_command(ctx, cmd_name)
        module, attribute, _ = _LAZY[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = {name: command.get_short_help_str(90) for name, command in self.commands.items()}
        rows = [(name, help_text) for name, (_, _, help_text) in _LAZY.items()] + sorted(own.items())
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=_Umbrella, context_settings={"help_option_names": ["-h", "--help"]})
@debug_option
def tmq() -> None:
    """Quantize a language model to 4 bits, measure it, talk to it, serve it.

    \b
    Talk to a model          tmq chat PATH
    Serve it                 tmq serve PATH
    and talk to the server   tmq client http://127.0.0.1:23333
    On a page, side by side  tmq web FP16-PATH INT4-PATH
    Is all in place?         tmq doctor

    PATH is a Hugging Face folder (fp16 or AWQ int4), a .gguf file or a TurboMind workspace.
    """


@tmq.command(short_help="Talk to a model in the terminal.", context_settings=SETTINGS)
@click.argument("path")
@together(sampling_options, engine_options, debug_option)
def chat(path: str, system: str, **flags: Any) -> None:
    """Talk to the model at PATH in the terminal, with its own chat template.

    Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer, Ctrl-D leaves; /help lists commands. Input that is no
    terminal is answered as one message. On the CPU int4 weights are dequantized once, while loading.

    \b
    Example:  tmq chat ./my-model-4bit
              echo "Write a 300-character story" | tmq chat ./my-model-4bit --max-tokens 200
    Next:     tmq serve ./my-model-4bit
    """
    _need("serve", "prompt_toolkit")
    from serve.backends import EngineBackend
    from serve.chat import chat as talk
    from serve.local import open_model

    settings = chat_settings(flags)
    config = engine_config(flags)
    with ExitStack() as stack:
        with _waiting(f"Loading {path}"):
            model = stack.enter_context(open_model(path, config, flags["trust_remote_code"]))
        backend = EngineBackend(model.engine, model.tokenizer, model.name)
        asyncio.run(talk(backend, settings, system, history_file()))


@tmq.command(short_help="Serve a model: OpenAI-compatible API, health, metrics.", context_settings=SETTINGS)
@click.argument("path")
@click.option(
    "--server-name", default=ServeConfig.server_name, show_default=True, help="Address to listen on."
)
@click.option(
    "--server-port",
    default=ServeConfig.server_port,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="0: any free one.",
)
@click.option("--model-name", default="", help="Name in the API. [default: the name of PATH]")
@key_file_option
@click.option(
    "--allow-origin",
    "allow_origins",
    multiple=True,
    help="Web site that may call the API (CORS); repeatable.",
)
@click.option(
    "--max-pending",
    default=Limits.pending,
    show_default=True,
    type=click.IntRange(1),
    help="Sequences running or waiting; beyond it 429.",
)
@click.option(
    "--request-timeout",
    default=Limits.request_s,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Seconds for one request.",
)
@click.option(
    "--drain-timeout",
    default=ServeConfig.drain_s,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds for running requests after SIGTERM.",
)
@click.option(
    "--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning", "error"])
)
@together(engine_options, debug_option)
def serve(path: str, **flags: Any) -> int:
    """Serve the model at PATH: an OpenAI-compatible API, LMDeploy's interactive endpoint, health and metrics.

    The page at / of the server shows how to call it. LMDeploy's flags work, with hyphens or underscores. SIGTERM lets running
    requests end; a second signal ends at once.

    \b
    Example:  tmq serve ./my-model-4bit --server-port 23333
    Next:     tmq client http://127.0.0.1:23333
    """
    _need("serve", "fastapi", "uvicorn", "prometheus_client")
    from dataclasses import replace

    from serve.auth import read_keys
    from serve.local import open_model
    from serve.server import bind, serve_forever, set_up_logging

    keys = read_keys(flags["api_key_file"]) if flags["api_key_file"] else ()
    if os.environ.get(KEY_VARIABLE):
        keys = (*keys, os.environ[KEY_VARIABLE])
    pending = flags["max_pending"]
    limits = Limits(pending=pending, pending_per_client=pending, request_s=flags["request_timeout"])
    try:
        config = ServeConfig(
            flags["server_name"],
            flags["server_port"],
            flags["model_name"],
            keys,
            flags["allow_origins"],
            flags["drain_timeout"],
            limits,
        )
    except ValueError as e:
        raise UsageError(str(e)) from e
    set_up_logging(flags["log_level"])
    engine = engine_config(flags)
    listener = bind(config)  # before the model is loaded: a port in use is told at once
    with ExitStack() as stack:
        stack.callback(listener.close)
        with _waiting(f"Loading {path}"):
            model = stack.enter_context(open_model(path, engine, flags["trust_remote_code"]))
        config = replace(
            config, server_port=listener.getsockname()[1], model_name=config.model_name or model.name
        )
        _announce(config)
        return serve_forever(model.engine, model.tokenizer, config, listener)


@tmq.command(short_help="Talk to a running server in the terminal.", context_settings=SETTINGS)
@click.argument("url")
@click.option("--model", help="Model to talk to. [default: the server's first]")
@key_file_option
@together(sampling_options, debug_option)
def client(url: str, model: str | None, system: str, api_key_file: Path | None, **flags: Any) -> None:
    """Talk to any OpenAI-compatible server at URL in the terminal.

    \b
    Example:  tmq client http://127.0.0.1:23333
    """
    _need("serve", "httpx", "prompt_toolkit")
    from serve.chat import chat as talk
    from serve.client import HttpBackend

    settings = chat_settings(flags)

    async def run() -> None:
        backend = await HttpBackend.connect(url, client_key(api_key_file), model)
        try:
            await talk(backend, settings, system, history_file())
        finally:
            await backend.close()

    asyncio.run(run())


@tmq.command(short_help="Talk to models on a web page, side by side.", context_settings=SETTINGS)
@click.argument("sources", nargs=-1, required=True, metavar="PATH|URL...")
@click.option(
    "--server-name", default=ServeConfig.server_name, show_default=True, help="Address to listen on."
)
@click.option(
    "--server-port", default=6006, show_default=True, type=click.IntRange(0, 65535), help="0: any free one."
)
@key_file_option
@together(engine_options, debug_option)
def web(
    sources: Sequence[str], server_name: str, server_port: int, api_key_file: Path | None, **flags: Any
) -> int:
    """A page to talk to models, side by side where several are given: PATH is loaded here, URL is a running server.

    The page loads nothing from the network and listens on this machine only.

    \b
    Example:  tmq web ./my-model ./my-model-4bit
              tmq web http://127.0.0.1:23333
    """
    _need("web", "gradio")
    _need("serve", "fastapi", "uvicorn", "httpx")
    from serve.backends import EngineBackend
    from serve.client import HttpBackend
    from serve.local import open_model
    from serve.server import bind, serve_page, set_up_logging

    if len(sources) > 4:
        raise UsageError(f"{len(sources)} models were given: the page has room for 4.")
    try:
        config = ServeConfig(server_name, server_port)
    except ValueError as e:
        raise UsageError(str(e)) from e
    if not config.is_loopback:
        raise UsageError(
            f"--server-name {server_name}: the page has no keys and listens on this machine only (127.0.0.1, ::1, localhost). "
            "From elsewhere, use a tunnel: ssh -L 6006:127.0.0.1:6006 HOST."
        )
    set_up_logging("warning")
    listener = bind(config)
    with ExitStack() as stack:
        stack.callback(listener.close)
        backends: list[Backend] = []
        for source in sources:
            if source.startswith(("http://", "https://")):
                backends.append(asyncio.run(HttpBackend.connect(source, client_key(api_key_file))))
                continue
            with _waiting(f"Loading {source}"):
                model = stack.enter_context(
                    open_model(source, engine_config(flags), flags["trust_remote_code"])
                )
            backends.append(EngineBackend(model.engine, model.tokenizer, model.name))
        from dataclasses import replace

        config = replace(config, server_port=listener.getsockname()[1])
        click.echo(f"The page is at {config.base_url}  (Ctrl-C ends it)", err=True)
        return serve_page(backends, config, listener)


@tmq.command(short_help="Check versions, GPU, memory, disk, extras.", context_settings=SETTINGS)
@together(json_option, debug_option)
def doctor(as_json: bool) -> int:
    """Check this machine and environment: versions, GPU, memory, disk, extras, clashing packages.

    \b
    Example:  tmq doctor
    """
    from dataclasses import asdict

    from serve.doctor import examine

    findings = list(examine(Path.cwd()))
    problems = sum(finding.status == "problem" for finding in findings)
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return 4 if problems else 0
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    marks = {
        "ok": "[green]ok     [/green]",
        "warning": "[yellow]warning[/yellow]",
        "problem": "[red]problem[/red]",
    }
    for finding in findings:
        console.print(f"{marks[finding.status]}  {escape(finding.subject):<20} {escape(finding.found)}")
        if finding.advice:
            console.print(f"         [dim]{escape(finding.advice)}[/dim]")
    console.print("All that is needed is there." if not problems else f"{problems} problems: see above.")
    return 4 if problems else 0


def _need(extra: str, *modules: str) -> None:
    """InputError naming the extra whose packages are absent."""
    from importlib.util import find_spec

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} is not installed: this command needs the extra [{extra}]. "
            f"pip install 'turbomind-quant[{extra}]'"
        )


def _waiting(text: str) -> Any:
    """A spinner on stderr where that is a terminal, one line where it is not."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.print(escape(text))
    return console.status(escape(text))


def _announce(config: ServeConfig) -> None:
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


if __name__ == "__main__":
    sys.exit(tmq())
