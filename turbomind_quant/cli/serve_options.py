"""Flags that several commands share, and what they become: EngineConfig, ChatSettings, keys. Defaults are read from those."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convert.errors import UsageError
from convert.folder.cache import cache_folder
from engine.config import EngineConfig
from engine.source import ModelSource
from turbomind_quant.cli.options import device_options, family_option, together

if TYPE_CHECKING:
    from serve.chat.backends import ChatSettings

KEY_VARIABLE = "TMQ_API_KEY"
# LMDeploy spells flags with underscores in some versions and hyphens in others: both work.
SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


def _choice_of_kv(context: click.Context, option: click.Parameter, value: int) -> int:
    if value not in (0, 8):
        raise click.BadParameter(
            f"{value} is not done: 8 keeps keys and values in int8, 0 in the model's own type."
        )
    return value


engine_options: Callable[[Any], Any] = together(
    device_options,
    family_option,
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
        callback=_choice_of_kv,
        help="8: keys and values in int8; 0: in the model's type.",
    ),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run a tokenizer that exists only as code in PATH."
    ),
)
sequences_option: Callable[[Any], Any] = click.option(
    "--instance-num",
    default=EngineConfig.max_batch,
    show_default=True,
    type=click.IntRange(1),
    help="Sequences that run at once.",
)
sampling_options: Callable[[Any], Any] = together(
    click.option("--system", default="", help="System text of the conversation."),
    click.option(
        "--temperature", default=0.7, show_default=True, type=click.FloatRange(0, 2), help="0 is greedy."
    ),
    click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True)),
    click.option("--top-k", default=0, show_default=True, type=click.IntRange(0), help="0: all tokens."),
    click.option(
        "--repetition-penalty", default=1.0, show_default=True, type=click.FloatRange(0, 10, min_open=True)
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(1),
        help="Of an answer; more than the context leaves is refused. [default: what the context leaves]",
    ),
    click.option("--seed", type=int, help="Same seed, same answers."),
)
key_file_option = click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"File with API keys, one per line. A key may also stand in the variable {KEY_VARIABLE}; never on the command line.",
)


def model_source(path: str, flags: dict[str, Any]) -> ModelSource:
    """What the flags say about the model at `path`."""
    return ModelSource(path, family=flags["family"], trust_remote_code=flags["trust_remote_code"])


def engine_config(flags: dict[str, Any]) -> EngineConfig:
    """The engine that the flags ask for, for one sequence where they do not say how many. Raises UsageError."""
    batch = flags.get("instance_num", 1)
    try:
        return EngineConfig(
            device=flags["device"],
            dtype=flags["dtype"],
            kv_bits=8 if flags["quant_policy"] == 8 else 16,
            cache_fraction=flags["cache_max_entry_count"],
            context_length=flags["session_len"],
            max_batch=batch,
            max_step_tokens=max(EngineConfig.max_step_tokens, batch),
            tp=flags["tp"],
        )
    except ValueError as e:
        raise UsageError(str(e)) from e


def chat_settings(flags: dict[str, Any]) -> "ChatSettings":
    """How answers are drawn, by the flags."""
    from serve.chat.backends import ChatSettings

    return ChatSettings(
        flags["temperature"],
        flags["top_p"],
        flags["top_k"],
        flags["repetition_penalty"],
        flags["max_tokens"],
        flags["seed"],
    )


def client_key(file: Path | None) -> str | None:
    """The key to send: the first of the file, or that of the environment."""
    if file is not None:
        from serve.http.auth import read_keys

        return read_keys(file)[0]
    return os.environ.get(KEY_VARIABLE) or os.environ.get("OPENAI_API_KEY")


def history_file() -> Path:
    """Where the terminal keeps what was typed."""
    return cache_folder() / "chat-history"
