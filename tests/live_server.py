"""A real server on a free port in a thread, around a fake engine: for tests that need sockets."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import httpx
import uvicorn
from fake_engine import FakeEngine, FakeTokenizer
from fastapi import FastAPI

from serve.config import ServeConfig
from serve.http.app import create_app
from serve.http.server import bind, uvicorn_config
from serve.http.service import Service

PATIENCE_S = 120.0  # for a state to come; a machine may be busy, and no figure is made of it
# httpx gives up after 5 s unless it is told otherwise, which a busy machine may take for an answer.
for _part in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, _part, PATIENCE_S)


def wait_until(condition: Callable[[], bool], what: str = "the state waited for") -> None:
    """Return once `condition` holds."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not come within {PATIENCE_S:g} s"
        time.sleep(0.01)


@dataclass
class LiveServer:
    url: str
    port: int
    engine: FakeEngine
    app: FastAPI

    @property
    def service(self) -> Service:
        return self.app.state.service

    def wait_idle(self) -> None:
        """Until nothing is held: no request in the engine, no run, no place in the queue."""

        def is_idle() -> bool:
            return not (self.engine.live or self.service.runs.count or self.service.admission.pending)

        wait_until(is_idle, "an idle server")


@contextmanager
def live_server(
    engine: FakeEngine | None = None,
    config: ServeConfig | None = None,
    tokenizer: FakeTokenizer | None = None,
    app: FastAPI | None = None,
    on_death: Callable[[], None] = lambda: None,
) -> Iterator[LiveServer]:
    config = replace(config or ServeConfig(), server_port=0)
    engine = engine or FakeEngine()
    app = app or create_app(engine, tokenizer or FakeTokenizer(), config, on_death)
    listener = bind(config)
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn_config(app, replace(config, drain_s=0.1)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    try:
        yield LiveServer(f"http://127.0.0.1:{port}", port, engine, app)
    finally:
        server.should_exit = True
        thread.join(10)
