"""The child of `engine.process.parent`: reads requests from standard input, steps the core, writes events to standard output.

Run as `python -m engine.process.child`; the first line says what to load. It ignores SIGINT and SIGTERM, which a terminal or a supervisor sends
to the whole group: it ends when its input does, which is when its parent ends or asks. What libraries print goes to standard error.
"""

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
STOP_GRACE_S = 5.0  # for the step in progress, once the parent has ended

log = logging.getLogger("engine")


def main() -> int:
    output = claim_output()
    ignore_signals()
    first = json.loads(sys.stdin.readline())
    first["config"]["graph_batches"] = tuple(first["config"]["graph_batches"])
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin, inbox), daemon=True).start()
    try:
        core = load_source(ModelSource(**first["source"]), EngineConfig(**first["config"]))
    except TmqError as error:
        write(output, json.dumps({"op": "failed", "kind": type(error).__name__, "error": str(error)}))
        return error.exit_code
    write(output, json.dumps({"op": "ready", "stats": _stats(core)}))
    try:
        serve(core, inbox, output)
    except BrokenPipeError:
        return 1  # the parent is gone
    finally:
        core.close()
    return 0


def serve(core: EngineCore, inbox: "queue.SimpleQueue[dict[str, Any]]", output: TextIO) -> None:
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
        events = core.step()
        lines = [encode_events(events)] if events else []
        now = time.monotonic()
        if now - told_at > STATS_PERIOD_S or not core.has_work:
            told_at = now
            lines.append(json.dumps({"op": "stats", "stats": _stats(core)}))
        if lines:
            write(output, *lines)


def write(output: TextIO, *lines: str) -> None:
    output.write("\n".join(lines) + "\n")
    output.flush()


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
    logging.basicConfig(level=logging.INFO, format=log_format("engine"), stream=sys.stderr)
    sys.exit(main())
