"""ProcessEngine: the engine in a process of its own, behind a pipe of JSON lines. What a server holds; imports no torch.

The parent writes `{"op": "add" | "abort" | "stop", ...}` to the child's standard input and reads `{"op": "ready" | "failed" | "events" |
"stats" | "alive", ...}`. Nothing is pickled and nothing listens. The child ends with its parent; when the child ends, every stream of
events raises EngineDied. Events reach the event loop through one reader thread, and messages leave through one writer thread: a
child that does not read, stopped or stuck in a driver, holds up neither `submit` nor `abort`. It shows by its signs of life, which
`trouble` judges.
"""

import asyncio
import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from convert.errors import InputError, ResourceError, TmqError, UsageError
from engine.api import EngineDied, Event, Request, Stats
from engine.config import EngineConfig
from engine.process.environment import child_environment
from engine.process.wire import decode_events
from engine.source import ModelSource

STOP_TIMEOUT_S = 10.0  # from "stop" to a kill
SILENCE_S = 15.0  # without a sign of life, of which one comes each second: the child hangs
STEP_S = 900.0  # one step this long: the device hangs. A full step of a large model takes minutes on a CPU
_ERRORS: dict[str, type[TmqError]] = {
    error.__name__: error for error in (InputError, ResourceError, UsageError, TmqError)
}


class _Stream:
    """Events of one request on their way to whoever reads them, in whatever event loop that is."""

    def __init__(self) -> None:
        self._news: list[Event | EngineDied] = []
        self._lock = threading.Lock()
        self._wake: Callable[[], None] | None = None

    def put(self, news: Event | EngineDied) -> None:
        with self._lock:
            self._news.append(news)
            wake = self._wake
        if wake is not None:
            wake()

    async def take(self) -> list[Event | EngineDied]:
        """All news; waits for the first."""
        loop, flag = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(flag.set)

        with self._lock:
            self._wake = wake
            if self._news:
                flag.set()
        await flag.wait()
        with self._lock:
            news, self._news = self._news, []
        return news


class ProcessEngine:
    """An `engine.api.Engine` whose work is done by a child process. Make one with `ProcessEngine.start`."""

    def __init__(self, process: "subprocess.Popen[str]", stats: Stats) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._input = process.stdin
        self._stats = stats
        self._streams: dict[str, _Stream] = {}
        self._wire_ids: dict[
            str, str
        ] = {}  # on the pipe no id is used twice, so that old news never reach a new request
        self._names: dict[str, str] = {}  # the other way round
        self._submitted = 0
        self._lock = threading.Lock()  # of the dictionaries
        self._death: EngineDied | None = None
        self._stopping = False
        self._outbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._last_sign, self._step_s = time.monotonic(), 0.0
        self.silence_s, self.longest_step_s = SILENCE_S, STEP_S
        self._reader = threading.Thread(
            target=self._read, args=(process.stdout,), name="engine-reader", daemon=True
        )
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    @staticmethod
    def start(source: ModelSource | str, config: EngineConfig) -> "ProcessEngine":
        """Start a child and wait until its model is loaded. Raises what loading raised, as the same error type."""
        if isinstance(source, str):
            source = ModelSource(source)
        process = subprocess.Popen(
            [sys.executable, "-m", "engine.process.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            bufsize=1,
            env=child_environment(),
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"source": asdict(source), "config": asdict(config)}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BaseException as error:
            process.kill()
            process.wait()
            if isinstance(error, OSError):
                raise EngineDied("The engine process ended before it took its configuration.") from error
            raise
        if not line:
            raise EngineDied(
                f"The engine process ended while loading the model (exit code {process.wait()})."
            )
        message = json.loads(line)
        if message["op"] == "failed":
            process.wait()
            raise _ERRORS.get(message["kind"], TmqError)(message["error"])
        return ProcessEngine(process, Stats.from_json(json.dumps(message["stats"])))

    @property
    def is_alive(self) -> bool:
        return self._death is None

    def submit(self, request: Request) -> str:
        """Queue a request. Raises ValueError where its id is in use, EngineDied where the child is gone."""
        with self._lock:
            if self._death is not None:
                raise self._death
            if request.id in self._wire_ids:
                raise ValueError(
                    f"request id {request.id!r} is in use: ids must be unique among running requests."
                )
            self._submitted += 1
            wire_id = self._wire_ids[request.id] = f"{self._submitted}"
            self._streams[wire_id] = _Stream()
            self._names[wire_id] = request.id
        self._send({"op": "add", "request": json.loads(replace(request, id=wire_id).to_json())})
        return request.id

    async def events(self, request_id: str) -> AsyncIterator[Event]:
        """Events until the one with a finish_reason. Left early, the request is aborted. Raises EngineDied."""
        wire_id = self._wire_ids.get(request_id)
        if wire_id is None:
            raise ValueError(
                f"request id {request_id!r} is unknown: submit the request, then read its events once."
            )
        stream = self._streams[wire_id]
        finished = False
        try:
            while not finished:
                for news in await stream.take():
                    if isinstance(news, EngineDied):
                        finished = True
                        raise news
                    finished = news.finish_reason is not None
                    yield news
        finally:
            if not finished:
                self.abort(request_id)
            with self._lock:
                del self._wire_ids[request_id], self._names[wire_id], self._streams[wire_id]

    def abort(self, request_id: str) -> None:
        """End a request; its events end with finish_reason "abort". Unknown ids and a dead engine are ignored."""
        wire_id = self._wire_ids.get(request_id)
        if self._death is None and wire_id is not None:
            self._send({"op": "abort", "id": wire_id})

    def stats(self) -> Stats:
        """The child's last snapshot, at most half a second old while it works. Raises EngineDied where the child is gone."""
        if self._death is not None:
            raise self._death
        return self._stats

    def trouble(self, silence_s: float | None = None) -> str | None:
        """What hangs, as a sentence; None while the child shows that it works. Blocks on nothing.

        `silence_s`: seconds without a sign of life that count as hanging; None: `self.silence_s`.
        """
        silent_s = time.monotonic() - self._last_sign
        if self._death is not None:
            return None
        if silent_s > (self.silence_s if silence_s is None else silence_s):
            state = _process_state(self._process.pid)
            return f"The engine process {self._process.pid} has given no sign of life for {silent_s:.0f} s{state}."
        if self._step_s > self.longest_step_s:
            return f"A step of the engine has taken {self._step_s:.0f} s so far: the device hangs."
        return None

    def close(self) -> None:
        """End the child: it is asked first and killed after `STOP_TIMEOUT_S`, at once where it hangs."""
        self._stopping = True
        hangs = self.trouble() is not None
        self._send({"op": "stop"})
        self._outbox.put(None)
        try:
            self._process.wait(0 if hangs else STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._writer.join()

    def __enter__(self) -> "ProcessEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, message: dict[str, Any]) -> None:
        self._outbox.put(json.dumps(message) + "\n")

    def _write(self) -> None:
        """Pass messages on until the last one. A pipe that nobody empties holds up this thread alone."""
        with contextlib.suppress(OSError, ValueError):  # a broken pipe: the reader tells everybody
            while (line := self._outbox.get()) is not None:
                self._input.write(line)
                self._input.flush()
        with contextlib.suppress(OSError):
            self._input.close()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            message = json.loads(line)
            self._last_sign = time.monotonic()
            if message["op"] == "alive":
                self._step_s = message["step_s"]
                continue
            if message["op"] == "stats":
                self._stats = Stats.from_json(json.dumps(message["stats"]))
                continue
            for wire_id, event in decode_events(message["events"], self._names):
                stream = self._streams.get(wire_id)
                if stream is not None:
                    stream.put(event)
        code = self._process.wait()
        reason = "was stopped" if self._stopping else f"ended unexpectedly (exit code {code})"
        with self._lock:
            self._death = EngineDied(f"The engine process {reason}: no request will be answered any more.")
            streams = list(self._streams.values())
        for stream in streams:
            stream.put(self._death)


def _process_state(pid: int) -> str:
    """What Linux says of a process, as " (State: T (stopped))"; nothing elsewhere."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        state = next(line for line in lines if line.startswith("State:"))
    except (OSError, StopIteration):
        return ""
    return f" ({' '.join(state.split())})"
