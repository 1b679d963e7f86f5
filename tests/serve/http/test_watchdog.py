"""What tells that something hangs: the thread that watches the event loop, and the server that ends with a frozen engine."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
from fake_engine import FakeEngine
from live_server import live_server

from serve.config import ServeConfig
from serve.http.watchdog import LoopWatch
from serve.limits import Limits


def test_a_loop_that_beats_is_left_alone_and_one_that_stops_is_ended() -> None:
    ended = threading.Event()
    watch = LoopWatch(limit_s=0.2, period_s=0.01, end=ended.set)
    with watch:
        for _ in range(100):
            watch.beat()
            time.sleep(0.005)
        assert not ended.is_set()
        assert ended.wait(60)


def test_a_blocked_event_loop_ends_the_process_and_says_where(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "faults" / "server_process.py"
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "port"), "1", "0", "block"],
        stderr=subprocess.PIPE,
        text=True,
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 70
    assert "event loop has stood still" in errors and "block_the_loop" in errors


def test_a_hanging_engine_is_reported_at_once_and_ends_the_server() -> None:
    engine = FakeEngine()
    died = threading.Event()
    with live_server(engine, on_death=died.set) as server:
        assert httpx.get(server.url + "/health").status_code == 200
        engine.hang = "The engine process 7 has given no sign of life for 15 s."
        reply = httpx.get(server.url + "/health")
        assert reply.status_code == 503 and "no sign of life" in reply.text
        assert died.wait(60)


def test_a_short_silence_ends_nothing() -> None:
    """A machine that was paused shows old signs of life at first."""
    engine = FakeEngine()
    died = threading.Event()
    looked = threading.Semaphore(0)

    def trouble(silence_s: float | None = None) -> str | None:
        looked.release()
        return "old signs" if looks.pop() else None

    looks = [False] * 1000 + [True] * 7
    engine.trouble = trouble  # type: ignore[method-assign]
    with live_server(engine, on_death=died.set):
        for _ in range(10):
            assert looked.acquire(timeout=60)
        assert not died.is_set()


def test_health_answers_while_its_probe_waits_behind_other_work() -> None:
    """The engine works, but not yet on the probe: that is 200, and comes without waiting for it."""
    engine = FakeEngine(delay_s=0.01, slots=1, context_length=100_000)
    with live_server(engine, ServeConfig(limits=Limits(health_s=1.0))) as server:
        body = {"messages": "x", "max_tokens": 3000, "stream": True}
        with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=60) as reply:
            next(reply.iter_lines())
            server.service.runs.last_token = -1e9
            for _ in range(3):
                server.service.runs.last_token = -1e9
                assert httpx.get(server.url + "/health", timeout=60).status_code == 200
