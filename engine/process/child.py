"""The child of `engine.process.parent`: reads requests from standard input, steps the core, writes events to standard output.

Run as `python -m engine.process.child`; the first line says what to load. It ignores SIGINT and SIGTERM, which a terminal or a supervisor sends
to the whole group: it ends when its input does, which is when its parent ends or asks. What libraries print goes to standard error.
"""

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
from typing import Any, TextIO

from convert.errors import TmqError
from engine.api import Request
from engine.config import EngineConfig
from engine.process.environment import claim_output, ignore_signals, log_format
from engine.process.launch import load_source
from engine.process.wire import encode_events
from engine.serving.core import EngineCore
from engine.source import ModelSource

STATS_PERIOD_S = 0.5
ALIVE_PERIOD_S = 1.0  # between two signs of life, also inside a long step
STOP_GRACE_S = 5.0  # for the step in progress, once the parent has ended

log = logging.getLogger("engine")


class Output:
    """The pipe to the parent, which the main loop and the signs of life share. `busy_since`: when the step in progress began."""

    def __init__(self, pipe: TextIO) -> None:
        self._pipe, self._lock = pipe, threading.Lock()
        self.busy_since: float | None = None

    def write(self, *lines: str) -> None:
        with self._lock:
            self._pipe.write("\n".join(lines) + "\n")
            self._pipe.flush()

    def show_life(self) -> None:
        """Tell the parent every second that this process runs, and for how long the step in progress has."""
        with contextlib.suppress(OSError, ValueError):  # the parent is gone: the main loop notices, too
            while True:
                time.sleep(ALIVE_PERIOD_S)
                since = self.busy_since
                step_s = 0.0 if since is None else time.monotonic() - since
                self.write(json.dumps({"op": "alive", "step_s": round(step_s, 3)}))


def main() -> int:
    output = Output(claim_output())
    ignore_signals()
    first = json.loads(sys.stdin.readline())
    first["config"]["graph_batches"] = tuple(first["config"]["graph_batches"])
    level = first["config"]["log_level"].upper()
    logging.basicConfig(level=level, format=log_format("engine"), stream=sys.stderr)
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin, inbox), daemon=True).start()
    try:
        core = load_source(ModelSource(**first["source"]), EngineConfig(**first["config"]))
    except TmqError as error:
        output.write(json.dumps({"op": "failed", "kind": type(error).__name__, "error": str(error)}))
        return error.exit_code
    output.write(json.dumps({"op": "ready", "stats": _stats(core)}))
    threading.Thread(target=output.show_life, daemon=True).start()
    try:
        serve(core, inbox, output)
    except BrokenPipeError:
        return 1  # the parent is gone
    finally:
        core.close()
    return 0


def serve(core: EngineCore, inbox: "queue.SimpleQueue[dict[str, Any]]", output: Output) -> None:
    """Step while there is work, wait for messages while there is none; until a "stop"."""
    told_at = 0.0
    while True:
        waits = not core.has_work
        while waits or not inbox.empty():
            message = inbox.get()
            waits = False
            if message["op"] == "stop":
                return
            _obey(core, message)
        output.busy_since = time.monotonic()
        events = core.step()
        output.busy_since = None
        lines = [encode_events(events)] if events else []
        now = time.monotonic()
        if now - told_at > STATS_PERIOD_S or not core.has_work:
            told_at = now
            lines.append(json.dumps({"op": "stats", "stats": _stats(core)}))
        if lines:
            output.write(*lines)


def _listen(lines: TextIO, inbox: "queue.SimpleQueue[dict[str, Any]]") -> None:
    for line in lines:
        inbox.put(json.loads(line))
    inbox.put({"op": "stop"})
    time.sleep(STOP_GRACE_S)
    os._exit(1)  # the parent is gone, and a step or a load does not come to its end


def _obey(core: EngineCore, message: dict[str, Any]) -> None:
    if message["op"] == "add":
        core.add(Request.from_json(json.dumps(message["request"])))
    else:
        core.abort(message["id"])


def _stats(core: EngineCore) -> dict[str, Any]:
    stats: dict[str, Any] = json.loads(core.stats().to_json())
    return stats


if __name__ == "__main__":
    sys.exit(main())
