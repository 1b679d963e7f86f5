"""The engine as a child process: streams, aborts, errors at loading, death of either side."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from convert.errors import InputError
from engine.api import EngineDied, Event, Request, SamplingParams, TokenLogprob
from engine.config import EngineConfig
from engine.process.parent import ProcessEngine
from engine.process.wire import decode_events, encode_events
from engine.source import ModelSource

SOURCE = ModelSource(random_weights="tiny")
CONFIG = EngineConfig(device="cpu", max_batch=4, max_step_tokens=64, context_length=4096)


def request(name: str, tokens: int = 8) -> Request:
    return Request(name, (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))


@pytest.fixture(scope="module")
def engine():
    with ProcessEngine.start(SOURCE, CONFIG) as engine:
        yield engine


async def read(engine: ProcessEngine, name: str) -> list:
    return [event async for event in engine.events(name)]


def wait_until(condition, seconds=120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_many_streams_at_once_end_and_are_not_crossed(engine):
    async def run():
        names = [engine.submit(request(f"r{i}", 1 + i % 5)) for i in range(40)]
        return await asyncio.gather(*(read(engine, name) for name in names))

    whole = asyncio.run(run())
    longest = [token for event in whole[4] for token in event.token_ids]
    for i, events in enumerate(whole):
        assert {event.request_id for event in events} == {f"r{i}"}
        assert [t for e in events for t in e.token_ids] == longest[: 1 + i % 5]
        assert events[-1].finish_reason == "length" and events[-1].completion_tokens == 1 + i % 5


def test_an_id_is_free_again_after_its_stream_and_an_old_abort_does_not_reach_the_new_one(engine):
    async def run():
        for _ in range(20):
            engine.submit(request("same", 500))
            async with contextlib.aclosing(engine.events("same")) as events:
                await anext(events)
        engine.submit(request("same", 3))
        return await read(engine, "same")

    events = asyncio.run(run())
    assert events[-1].finish_reason == "length" and events[-1].completion_tokens == 3


def test_abort_ends_the_stream_and_frees_the_blocks(engine):
    async def run():
        engine.submit(request("long", 4000))
        events = []
        async for event in engine.events("long"):
            events.append(event)
            if len(events) == 3:
                engine.abort("long")
        return events

    assert asyncio.run(run())[-1].finish_reason == "abort"
    wait_until(
        lambda: engine.stats().running == 0 and engine.stats().blocks_free == engine.stats().blocks_total
    )


def test_a_duplicate_id_is_refused(engine):
    engine.submit(request("twice", 2))
    with pytest.raises(ValueError, match="in use"):
        engine.submit(request("twice", 2))
    asyncio.run(read(engine, "twice"))


def test_the_child_ignores_interrupts(engine):
    os.kill(engine._process.pid, signal.SIGINT)
    os.kill(engine._process.pid, signal.SIGTERM)
    engine.submit(request("after", 2))
    assert asyncio.run(read(engine, "after"))[-1].finish_reason == "length"


def test_death_of_the_child_reaches_every_stream():
    """I94."""
    engine = ProcessEngine.start(SOURCE, CONFIG)

    async def run():
        names = [engine.submit(request(f"r{i}", 4000)) for i in range(3)]
        streams = [asyncio.create_task(read(engine, name)) for name in names]
        await asyncio.sleep(0.2)
        engine._process.kill()
        return await asyncio.gather(*streams, return_exceptions=True)

    assert all(isinstance(result, EngineDied) for result in asyncio.run(run()))
    assert not engine.is_alive
    with pytest.raises(EngineDied):
        engine.submit(request("late"))
    engine.close()


def test_the_child_ends_with_its_parent(tmp_path):
    code = (
        "import os, sys, time\n"
        "from engine.process.parent import ProcessEngine\n"
        "from engine.source import ModelSource\n"
        "from engine.config import EngineConfig\n"
        "engine = ProcessEngine.start(ModelSource(random_weights='tiny'), EngineConfig(device='cpu', max_batch=1))\n"
        "print(engine._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_until(
        lambda: not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes()
    )


def test_what_loading_raises_reaches_the_parent():
    with pytest.raises(InputError, match="nowhere"):
        ProcessEngine.start("/nowhere/at/all", CONFIG)


def test_events_survive_the_pipe():
    logprob = TokenLogprob(3, b"x", -0.5, ((3, b"x", -0.5), (4, b"\xe9\n\x00\xff", -1.5)))
    events = [
        Event("1", (3, 4), "x\u2028é\n", (logprob,), "stop", None, 5, 2),
        Event("2", finish_reason="error", error="no", prompt_tokens=1),
        Event("3", (1,)),
    ]
    line = encode_events(events)
    assert "\n" not in line
    decoded = decode_events(json.loads(line)["events"], {"1": "one", "2": "two"})
    assert decoded == [
        (e.request_id, replace(e, request_id=n)) for e, n in zip(events, ("one", "two"), strict=False)
    ]


def test_a_frozen_child_holds_nobody_up_and_is_told(monkeypatch):
    """B7: more than a pipe holds is submitted to a child that does not read; `trouble` names it; `close` does not wait."""
    monkeypatch.setattr("engine.process.parent.STOP_TIMEOUT_S", 1e6)  # waited for, the test would never end
    engine = ProcessEngine.start(SOURCE, CONFIG)
    engine.silence_s = 2.5
    assert engine.trouble() is None
    os.kill(engine._process.pid, signal.SIGSTOP)
    done = threading.Event()

    def submit():
        for i in range(200):
            engine.submit(Request(f"r{i}", (1,) * 2000, SamplingParams(max_tokens=1)))
            engine.abort(f"r{i}")
        done.set()

    threading.Thread(target=submit, daemon=True).start()
    assert done.wait(60), "submit waits for the pipe"
    wait_until(lambda: engine.trouble() is not None)
    told = engine.trouble()
    assert str(engine._process.pid) in told and "no sign of life" in told and "stopped" in told
    engine.close()
    assert engine._process.returncode == -signal.SIGKILL


def test_a_child_that_goes_on_is_in_no_trouble_any_more():
    engine = ProcessEngine.start(SOURCE, CONFIG)
    engine.silence_s = 2.5
    os.kill(engine._process.pid, signal.SIGSTOP)
    wait_until(lambda: engine.trouble() is not None)
    os.kill(engine._process.pid, signal.SIGCONT)
    wait_until(lambda: engine.trouble() is None)
    engine.submit(request("after", 2))
    assert asyncio.run(read(engine, "after"))[-1].finish_reason == "length"
    engine.close()
    assert engine._process.returncode == 0


def test_a_step_without_end_is_told_while_the_child_shows_life(engine):
    """The device hangs, the interpreter does not: signs of life come and say how long the step has taken."""
    engine.longest_step_s, before = 0.0, engine.longest_step_s
    engine.submit(request("long", 4000))
    try:
        wait_until(lambda: (engine.trouble() or "").startswith("A step of the engine has taken"))
    finally:
        engine.longest_step_s = before
        engine.abort("long")
        asyncio.run(read(engine, "long"))
