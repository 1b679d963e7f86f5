"""Flags of `tmq serve` alone: what it bears, as one frozen config, and the flags of LMDeploy that people type. No torch here."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from convert.errors import UsageError
from serve.limits import Limits
from turbomind_quant.cli.options import together
from turbomind_quant.cli.serve_options import gathered

F = TypeVar("F", bound=Callable[..., Any])
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def _limits(
    max_pending: int,
    max_pending_per_key: int | None,
    max_sessions: int,
    max_sessions_per_key: int,
    stall_timeout: float,
    request_timeout: float,
) -> Limits:
    return Limits(
        pending=max_pending,
        pending_per_client=max_pending_per_key,
        sessions=max_sessions,
        sessions_per_client=max_sessions_per_key,
        stall_s=stall_timeout,
        request_s=request_timeout,
    )


# As `limits`: what the server bears.
limit_options: Callable[[F], F] = gathered(
    "limits",
    _limits,
    click.option(
        "--max-pending",
        default=Limits.pending,
        show_default=True,
        type=click.IntRange(1),
        help="Sequences running or waiting; beyond it 429.",
    ),
    click.option(
        "--max-pending-per-key",
        type=click.IntRange(1),
        help="The same for one API key, or one address where there are no keys. "
        "[default: half of all where several may ask]",
    ),
    click.option(
        "--max-sessions",
        default=Limits.sessions,
        show_default=True,
        type=click.IntRange(1),
        help="Conversations kept for /v1/chat/interactive.",
    ),
    click.option(
        "--max-sessions-per-key",
        default=Limits.sessions_per_client,
        show_default=True,
        type=click.IntRange(1),
        help="The same for one API key or address.",
    ),
    click.option(
        "--stall-timeout",
        default=Limits.stall_s,
        show_default=True,
        type=click.FloatRange(0, min_open=True),
        help="Seconds until a client that does not read its answer loses it.",
    ),
    click.option(
        "--request-timeout",
        default=Limits.request_s,
        show_default=True,
        type=click.FloatRange(0, min_open=True),
        help="Seconds for one request.",
    ),
)


def _said(flag: str, note: str) -> Callable[[F], F]:
    """A flag of LMDeploy that is taken and changes nothing here; a note says why."""

    def tell(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            click.echo(f"note: {flag} {value} changes nothing here: {note}.", err=True)

    return click.option(flag, hidden=True, expose_value=False, callback=tell)


def _answered(flag: str, answer: str) -> Callable[[F], F]:
    """A flag of LMDeploy that is refused with what to use in its place."""

    def refuse(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise UsageError(f"{flag}: {answer}.")

    return click.option(flag, hidden=True, expose_value=False, callback=refuse)


lmdeploy_options: Callable[[Any], Any] = together(
    _said("--backend", "there is one engine, which chooses its kernels by the device"),
    _said("--model-format", "the format is read from the files of PATH"),
    _answered(
        "--chat-template",
        "the template of the checkpoint is used. To serve another one, put it into PATH as chat_template.jinja",
    ),
    _answered(
        "--api-keys",
        "a key on the command line is seen by every user of the machine. Put the keys into a file, one a line, and name it "
        "with --api-key-file, or set TMQ_API_KEY; and take another key than this one",
    ),
)
