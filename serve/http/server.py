"""The server process: socket, signals, logging, exit code. SIGTERM drains, a second signal ends at once.

Exit codes: 0 drained, 70 the engine died or something hangs, 130 or 143 ended by a second signal.
"""

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from convert.errors import ResourceError
from engine.api import Engine
from serve.config import ServeConfig
from serve.http.app import create_app
from serve.http.connections import limited_protocol
from serve.http.errors import unavailable
from serve.http.generation.runs import Runs
from serve.http.middleware import escaped
from serve.http.watchdog import LoopWatch
from serve.prompts.encoder import Tokenizer
from serve.prompts.pool import WorkerPool

log = logging.getLogger("tmq.serve")
_DEATH_GRACE_S = 2.0  # time in which /health shows 503 and pending requests get their error


class _LineFormatter(logging.Formatter):
    """One record, one line: control characters of a message are escaped; a traceback keeps its lines, indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escaped(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join("    " + escaped(line) for line in super().formatException(ei).splitlines())


def set_up_logging(level: str) -> None:
    """Log lines of the server and of uvicorn go to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("tmq", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())


def bind(config: ServeConfig) -> socket.socket:
    """A bound socket for the configured address. Raises ResourceError with the reason in plain words."""
    name, port = config.server_name, config.server_port
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(min(config.limits.connections, 65535))
        except BaseException:
            listener.close()
            raise
    except socket.gaierror as e:
        raise ResourceError(
            f"--server-name {name} is not an address of this machine: use 127.0.0.1, ::1 or 0.0.0.0."
        ) from e
    except OSError as e:
        hints = {
            errno.EADDRINUSE: "another program listens there; choose another --server-port, or 0 for any free one",
            errno.EACCES: "ports below 1024 need privileges; choose a --server-port above 1023",
            errno.EADDRNOTAVAIL: "this machine has no such address; use 127.0.0.1, ::1 or 0.0.0.0",
        }
        hint = hints.get(e.errno or 0, os.strerror(e.errno or 0))
        raise ResourceError(f"Cannot listen on {name} port {port}: {hint}.") from e
    return listener


class DrainingServer(uvicorn.Server):
    """uvicorn with our way to end. `runs` are told to end, where there are any."""

    def __init__(self, config: uvicorn.Config, drain_s: float, runs: Runs | None = None) -> None:
        super().__init__(config)
        self._runs, self._drain_s = runs, drain_s
        self._watch = LoopWatch()
        self.exit_code = 0

    async def main_loop(self) -> None:
        with self._watch:
            await super().main_loop()

    async def on_tick(self, counter: int) -> bool:
        self._watch.beat()
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn raises the signal again after a clean end; a drained server is a success, so we do not.
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {sig: signal.signal(sig, self.handle_exit) for sig in handled}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit, self.exit_code = True, 128 + sig
            return
        asyncio.get_running_loop().call_soon_threadsafe(self._drain)
        self.should_exit = True

    def _drain(self) -> None:
        if self._runs is None:
            return
        log.info(
            "Ending: %d requests have up to %g s. A second signal ends at once.",
            self._runs.count,
            self._drain_s,
        )
        ending = unavailable("The server is ending.")
        self._runs.refuse(ending)
        asyncio.get_running_loop().call_later(self._drain_s, self._runs.fail_all, ending)

    def engine_died(self) -> None:
        self.exit_code = 70

        def end() -> None:
            self.should_exit = True

        asyncio.get_running_loop().call_later(_DEATH_GRACE_S, end)


def _raise_file_limit(connections: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))


def uvicorn_config(app: FastAPI, config: ServeConfig) -> uvicorn.Config:
    """uvicorn with our limits and without what we do ourselves."""
    limits = config.limits
    logging.getLogger("uvicorn.access").disabled = True  # its lines hold what clients sent; ours are escaped
    return uvicorn.Config(
        app,
        http=limited_protocol(limits.header_s, limits.stall_s),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.header_bytes,
        limit_concurrency=limits.connections,
        timeout_keep_alive=max(1, round(limits.keep_alive_s)),
        timeout_graceful_shutdown=max(1, round(config.drain_s + 2)),
    )


def serve_forever(
    engine: Engine, tokenizer: Tokenizer | WorkerPool, config: ServeConfig, listener: socket.socket
) -> int:
    """Answer requests on `listener` until a signal or the death of the engine. Returns the exit code."""
    _raise_file_limit(config.limits.connections)
    server: DrainingServer | None = None

    def on_death() -> None:
        if server is not None:
            server.engine_died()

    app = create_app(engine, tokenizer, config, on_death)
    server = DrainingServer(uvicorn_config(app, config), config.drain_s, app.state.service.runs)
    server.run(sockets=[listener])
    return server.exit_code
