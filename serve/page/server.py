"""The page as a process: on a listener, until a signal."""

import socket
from collections.abc import Sequence

from serve.chat.backends import Backend
from serve.config import ServeConfig
from serve.http.server import DrainingServer, uvicorn_config
from serve.page.app import create_page

DRAIN_S = 1.0  # for answers that run when the signal comes


def serve_page(backends: Sequence[Backend], config: ServeConfig, listener: socket.socket) -> int:
    """Show the web page on `listener` until a signal. Returns the exit code."""
    server = DrainingServer(uvicorn_config(create_page(backends, config), config), DRAIN_S)
    server.run(sockets=[listener])
    return server.exit_code
