"""The commands that listen: `tmq serve` and `tmq web`. Flags in, calls out; heavy imports wait inside."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convert.errors import UsageError
from engine.config import EngineConfig
from engine.source import ModelSource
from serve.config import ServeConfig
from serve.limits import Limits
from turbomind_quant.cli.commands import debug_option
from turbomind_quant.cli.notices import announce, need, waiting
from turbomind_quant.cli.options import together
from turbomind_quant.cli.serve_options import (
    SETTINGS,
    client_key,
    key_file_option,
    server_engine_options,
    server_keys,
    source_options,
)
from turbomind_quant.cli.server_options import LOG_LEVELS, limit_options, lmdeploy_options

if TYPE_CHECKING:
    from serve.chat.backends import Backend


@click.command(short_help="Serve a model: OpenAI-compatible API, health, metrics.", context_settings=SETTINGS)
@click.argument("path")
@click.option(
    "--server-name",
    "--host",
    default=ServeConfig.server_name,
    show_default=True,
    help="Address to listen on.",
)
@click.option(
    "--server-port",
    "--port",
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
@limit_options
@click.option(
    "--drain-timeout",
    default=ServeConfig.drain_s,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds for running requests after SIGTERM.",
)
@click.option(
    "--log-level",
    default="info",
    show_default=True,
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
)
@lmdeploy_options
@together(server_engine_options, source_options, debug_option)
def serve(
    path: str,
    server_name: str,
    server_port: int,
    model_name: str,
    api_key_file: Path | None,
    allow_origins: tuple[str, ...],
    limits: Limits,
    drain_timeout: float,
    log_level: str,
    engine: EngineConfig,
    family: str | None,
    trust_remote_code: bool,
) -> int:
    """Serve the model at PATH: an OpenAI-compatible API, LMDeploy's interactive endpoint, health and metrics.

    The page at / of the server shows how to call it. LMDeploy's flags work, with hyphens or underscores. SIGTERM lets running
    requests end; a second signal ends at once.

    \b
    Example:  tmq serve ./my-model-4bit --server-port 23333
    Next:     tmq client http://127.0.0.1:23333
    """
    need("serve", "fastapi", "uvicorn", "prometheus_client")
    from serve.http.server import bind, serve_forever, set_up_logging
    from serve.local import open_model

    keys = server_keys(api_key_file)
    try:
        config = ServeConfig(server_name, server_port, model_name, keys, allow_origins, drain_timeout, limits)
    except ValueError as e:
        raise UsageError(str(e)) from e
    set_up_logging(log_level)
    source = ModelSource(path, family=family, trust_remote_code=trust_remote_code)
    listener = bind(config)  # before the model is loaded: a port in use is told at once
    with ExitStack() as stack:
        stack.callback(listener.close)
        with waiting(f"Loading {path}"):
            model = stack.enter_context(open_model(source, engine))
        config = replace(
            config, server_port=listener.getsockname()[1], model_name=config.model_name or model.name
        )
        announce(config)
        return serve_forever(model.engine, model.worker_pool(), config, listener)


@click.command(short_help="Talk to models on a web page, side by side.", context_settings=SETTINGS)
@click.argument("sources", nargs=-1, required=True, metavar="PATH|URL...")
@click.option(
    "--server-name", default=ServeConfig.server_name, show_default=True, help="Address to listen on."
)
@click.option(
    "--server-port", default=6006, show_default=True, type=click.IntRange(0, 65535), help="0: any free one."
)
@key_file_option
@together(server_engine_options, source_options, debug_option)
def web(
    sources: Sequence[str],
    server_name: str,
    server_port: int,
    api_key_file: Path | None,
    engine: EngineConfig,
    family: str | None,
    trust_remote_code: bool,
) -> int:
    """A page to talk to models, side by side where several are given: PATH is loaded here, URL is a running server.

    The page loads nothing from the network and listens on this machine only.

    \b
    Example:  tmq web ./my-model ./my-model-4bit
              tmq web http://127.0.0.1:23333
    """
    import asyncio

    need("web", "gradio")
    need("serve", "fastapi", "uvicorn", "httpx")
    from serve.chat.backends import EngineBackend
    from serve.chat.client import HttpBackend
    from serve.http.server import bind, set_up_logging
    from serve.local import open_model
    from serve.page.server import serve_page

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
            with waiting(f"Loading {source}"):
                place = ModelSource(source, family=family, trust_remote_code=trust_remote_code)
                model = stack.enter_context(open_model(place, engine))
            backends.append(EngineBackend(model.engine, model.tokenizer, model.name, clip=True))
        config = replace(config, server_port=listener.getsockname()[1])
        click.echo(f"The page is at {config.base_url}  (Ctrl-C ends it)", err=True)
        return serve_page(backends, config, listener)
