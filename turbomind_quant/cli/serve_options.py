"""Flags that `chat`, `serve`, `client` and `web` share. Each group reaches its command as one frozen config. No torch here."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from convert.folder.cache import cache_folder
from engine.config import EngineConfig
from serve.chat.settings import ChatSettings
from turbomind_quant.api.engine import engine_config
from turbomind_quant.cli.options import device_options, family_option, together

F = TypeVar("F", bound=Callable[..., Any])
KEY_VARIABLE = "TMQ_API_KEY"
# LMDeploy spells flags with underscores in some versions and hyphens in others: both work.
SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


def gathered(parameter: str, build: Callable[..., object], *options: Callable[[Any], Any]) -> Any:
    """These options as one decorator; the command gets `parameter` = build(option=value, ...) in place of them."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        names: list[str] = []

        @functools.wraps(command)
        def call(*arguments: Any, **values: Any) -> Any:
            taken = {name: values.pop(name) for name in names}
            return command(*arguments, **values, **{parameter: build(**taken)})

        before = len(getattr(call, "__click_params__", []))
        decorated: Callable[..., Any] = together(*options)(call)
        names += [option.name for option in getattr(decorated, "__click_params__", [])[before:]]
        return decorated

    return decorate


_engine_flags = (
    device_options,
    click.option(
        "--tp", default=EngineConfig.tp, show_default=True, type=click.IntRange(1), help="GPUs to split over."
    ),
    click.option("--session-len", type=click.IntRange(1), help="Context in tokens. [default: the model's]"),
    click.option(
        "--cache-max-entry-count",
        default=EngineConfig.cache_fraction,
        show_default=True,
        type=click.FloatRange(0, 1, min_open=True),
        help="Share of the memory left after the weights that the KV cache takes.",
    ),
    click.option(
        "--quant-policy",
        default=0,
        show_default=True,
        type=int,
        help="8: keys and values in int8; 0: in the model's type.",
    ),
)
_sequences_flag = click.option(
    "--instance-num",
    "--max-batch-size",
    default=EngineConfig.max_batch,
    show_default=True,
    type=click.IntRange(1),
    help="Sequences that run at once.",
)
# As `engine`: an EngineConfig for one sequence at a time, or for many.
engine_options: Callable[[F], F] = gathered("engine", engine_config, *_engine_flags)
server_engine_options: Callable[[F], F] = gathered("engine", engine_config, *_engine_flags, _sequences_flag)
# As `settings`: ChatSettings.
sampling_options: Callable[[F], F] = gathered(
    "settings",
    ChatSettings,
    click.option(
        "--temperature",
        default=ChatSettings.temperature,
        show_default=True,
        type=click.FloatRange(0, 2),
        help="0 is greedy.",
    ),
    click.option(
        "--top-p",
        default=ChatSettings.top_p,
        show_default=True,
        type=click.FloatRange(0, 1, min_open=True),
        help="Share of the likeliest tokens that are drawn from.",
    ),
    click.option(
        "--top-k",
        default=ChatSettings.top_k,
        show_default=True,
        type=click.IntRange(0),
        help="0: all tokens.",
    ),
    click.option(
        "--repetition-penalty",
        default=ChatSettings.repetition_penalty,
        show_default=True,
        type=click.FloatRange(0, 10, min_open=True),
        help="Above 1: tokens that were there already are less likely.",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(1),
        help="Of an answer; more than the context leaves is refused. [default: what the context leaves]",
    ),
    click.option("--seed", type=int, help="Same seed, same answers."),
)
# As `family` and `trust_remote_code`: how the checkpoint and its tokenizer are read.
source_options: Callable[[Any], Any] = together(
    family_option,
    click.option(
        "--trust-remote-code", is_flag=True, help="Run a tokenizer that exists only as code in PATH."
    ),
)
system_option = click.option("--system", default="", help="System text of the conversation.")
key_file_option = click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"File with API keys, one per line. A key may also stand in the variable {KEY_VARIABLE}; never on the command line.",
)


def server_keys(file: Path | None) -> tuple[str, ...]:
    """The keys that a server accepts: those of the file, and that of the environment."""
    keys: tuple[str, ...] = ()
    if file is not None:
        from serve.http.auth import read_keys

        keys = read_keys(file)
    return (*keys, os.environ[KEY_VARIABLE]) if os.environ.get(KEY_VARIABLE) else keys


def client_key(file: Path | None) -> str | None:
    """The key to send: the first of the file, or that of the environment."""
    if file is not None:
        from serve.http.auth import read_keys

        return read_keys(file)[0]
    return os.environ.get(KEY_VARIABLE) or os.environ.get("OPENAI_API_KEY")


def history_file() -> Path:
    """Where the terminal keeps what was typed."""
    return cache_folder() / "chat-history"
