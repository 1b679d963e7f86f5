"""The `tmq` command: chat, serve, client, web and doctor; `quantize` and `evaluate` hang below it, loaded when called.

`serve` and `web` are in `turbomind_quant.cli.server`. Heavy imports wait inside.
"""

import importlib
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.source import ModelSource
from turbomind_quant.cli.commands import HELP, Commands, debug_option, version_option
from turbomind_quant.cli.notices import need, waiting
from turbomind_quant.cli.options import json_option, together
from turbomind_quant.cli.serve_options import (
    SETTINGS,
    client_key,
    engine_options,
    history_file,
    key_file_option,
    sampling_options,
    source_options,
    system_option,
)
from turbomind_quant.cli.server import serve, web

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from serve.chat.settings import ChatSettings

_LAZY = {
    "quantize": (
        "turbomind_quant.cli.quantize",
        "quantize",
        "Turn a model into a 4-bit one: calibrate, awq, pack, verify, inspect.",
    ),
    "evaluate": (
        "turbomind_quant.cli.evaluate",
        "evaluate",
        "Measure perplexity and throughput, and report.",
    ),
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


@click.group(cls=_Umbrella, context_settings=HELP)
@version_option
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
@together(system_option, sampling_options, engine_options, source_options, debug_option)
def chat(
    path: str,
    system: str,
    settings: "ChatSettings",
    engine: "EngineConfig",
    family: str | None,
    trust_remote_code: bool,
) -> None:
    """Talk to the model at PATH in the terminal, with its own chat template.

    Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer, Ctrl-D leaves; /help lists commands. Input that is no
    terminal is answered as one message. On the CPU int4 weights are dequantized once, while loading.

    \b
    Example:  tmq chat ./my-model-4bit
              echo "Write a 300-character story" | tmq chat ./my-model-4bit --max-tokens 200
    Next:     tmq serve ./my-model-4bit
    """
    import asyncio

    need("serve", "prompt_toolkit")
    from serve.chat.backends import EngineBackend
    from serve.chat.loop import chat as talk
    from serve.local import open_model

    source = ModelSource(path, family=family, trust_remote_code=trust_remote_code)
    with ExitStack() as stack:
        with waiting(f"Loading {path}"):
            model = stack.enter_context(open_model(source, engine))
        backend = EngineBackend(model.engine, model.tokenizer, model.name)
        asyncio.run(talk(backend, settings, system, history_file()))


@tmq.command(short_help="Talk to a running server in the terminal.", context_settings=SETTINGS)
@click.argument("url")
@click.option("--model", help="Model to talk to. [default: the server's first]")
@key_file_option
@together(system_option, sampling_options, debug_option)
def client(
    url: str, model: str | None, system: str, api_key_file: Path | None, settings: "ChatSettings"
) -> None:
    """Talk to any OpenAI-compatible server at URL in the terminal.

    \b
    Example:  tmq client http://127.0.0.1:23333
    """
    import asyncio

    need("serve", "httpx", "prompt_toolkit")
    from serve.chat.client import HttpBackend
    from serve.chat.loop import chat as talk

    async def run() -> None:
        backend = await HttpBackend.connect(url, client_key(api_key_file), model)
        try:
            await talk(backend, settings, system, history_file())
        finally:
            await backend.close()

    asyncio.run(run())


@tmq.command(short_help="Check versions, GPU, memory, disk, extras.", context_settings=SETTINGS)
@together(json_option, debug_option)
def doctor(as_json: bool) -> int:
    """Check this machine and environment: versions, GPU, memory, disk, extras, clashing packages.

    \b
    Example:  tmq doctor
    """
    from dataclasses import asdict

    from turbomind_quant.api.doctor import examine
    from turbomind_quant.cli.printing import show
    from turbomind_quant.cli.views.doctor import doctor_view

    findings = list(examine(Path.cwd()))
    has_problems = any(finding.status == "problem" for finding in findings)
    show([asdict(finding) for finding in findings], lambda: doctor_view(findings), as_json)
    return 4 if has_problems else 0


tmq.add_command(serve)
tmq.add_command(web)

if __name__ == "__main__":
    sys.exit(tmq())
