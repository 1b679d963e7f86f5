"""FAULTS group I, what the server owes: load, fairness, failures, endings. The engine is a fake one; e2e tests have the real one."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fake_engine import WORDS, FakeEngine, FakeTokenizer
from live_server import PATIENCE_S, LiveServer, live_server, wait_until

from serve.config import ServeConfig
from serve.limits import Limits

CHAT = "/v1/chat/completions"
SOAK = int(os.environ.get("TMQ_SOAK_REQUESTS", "2000"))  # 10000 for the full figure


def expected(text: str, count: int) -> str:
    prompt = len(FakeTokenizer().apply_chat_template([{"role": "user", "content": text}]))
    return "".join(WORDS[(prompt + i) % len(WORDS)] for i in range(count))


def many(url: str, jobs: list[Callable[[httpx.AsyncClient], object]], width: int = 2000) -> list[object]:
    """Run coroutine functions at the same time on one client; exceptions come back as values."""

    async def run() -> list[object]:
        limits = httpx.Limits(max_connections=width, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=PATIENCE_S) as client:
            return await asyncio.gather(*(job(client) for job in jobs), return_exceptions=True)  # type: ignore[arg-type]

    return asyncio.run(run())


async def _stream(client: httpx.AsyncClient, text: str, count: int) -> str:
    parts = []
    body = {"messages": text, "max_tokens": count, "stream": True}
    async with client.stream("POST", CHAT, json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                parts += [c["delta"].get("content", "") for c in json.loads(line[6:])["choices"]]
    return "".join(parts)


@pytest.mark.parametrize("case", ["I89-requests-over-queue"])
def test_requests_over_the_queue_get_429(case: str) -> None:
    engine = FakeEngine(delay_s=0.001)
    with live_server(engine, ServeConfig(limits=Limits(pending=50, pending_per_client=50))) as server:

        async def inside(client: httpx.AsyncClient) -> object:
            return await client.post(CHAT, json={"messages": "inside", "max_tokens": 150})

        refused = 0

        async def beyond(client: httpx.AsyncClient) -> object:
            nonlocal refused
            while server.service.admission.pending < 50:
                await asyncio.sleep(0.01)
            reply = await client.post(CHAT, json={"messages": "beyond", "max_tokens": 150})
            refused += 1
            engine.hangs = refused < 1000  # those inside end after the last refusal
            return reply

        engine.hangs = True
        replies = many(server.url, [inside] * 50 + [beyond] * 1000)
        assert all(isinstance(reply, httpx.Response) for reply in replies), replies[0]
        statuses = [reply.status_code for reply in replies]  # type: ignore[attr-defined]
        assert statuses[:50] == [200] * 50
        assert statuses[50:].count(429) == 1000
        refusal = replies[-1]
        assert isinstance(refusal, httpx.Response)
        assert 1 <= int(refusal.headers["retry-after"]) <= 60
        assert refusal.json()["error"]["code"] == "queue_full"
        texts = {reply.json()["choices"][0]["message"]["content"] for reply in replies[:50]}  # type: ignore[attr-defined]
        assert texts == {expected("inside", 150)}
        server.wait_idle()
        assert "tmq_refused_total 1000.0" in httpx.get(server.url + "/metrics").text


@pytest.mark.parametrize("case", ["I89-one-client-cannot"])
def test_one_client_cannot_take_the_whole_queue(case: str) -> None:
    limits = Limits(pending=10, pending_per_client=2)
    config = ServeConfig(api_keys=("a", "b"), limits=limits)
    with live_server(FakeEngine(delay_s=0.05), config) as server:

        async def ask(client: httpx.AsyncClient, key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return (
                await client.post(CHAT, json={"messages": "x", "max_tokens": 20}, headers=headers)
            ).status_code

        jobs = [lambda client, k=key: ask(client, k) for key in "aaaaab"]
        statuses = many(server.url, jobs)
        assert sorted(statuses[:5]) == [200, 200, 429, 429, 429]  # type: ignore[type-var]
        assert statuses[5] == 200


@pytest.mark.parametrize("case", ["I90-short-requests-pass"])
def test_short_requests_pass_long_ones(case: str) -> None:
    with live_server(FakeEngine(delay_s=0.005, context_length=4000)) as server:
        ended: list[int] = []

        async def ask(client: httpx.AsyncClient, count: int) -> None:
            assert await _stream(client, "x", count) == expected("x", count)
            ended.append(count)

        many(server.url, [lambda client, n=n: ask(client, n) for n in [400] * 5 + [3] * 20])
        assert ended == [3] * 20 + [400] * 5


@pytest.mark.parametrize("case", ["I93-one-failure-stays"])
def test_one_failure_stays_one(case: str) -> None:
    engine = FakeEngine(delay_s=0.002)
    bad = "x" * 40
    engine.fails = {str(len(FakeTokenizer().apply_chat_template([{"role": "user", "content": bad}])))}
    with live_server(engine) as server:

        async def ask(client: httpx.AsyncClient, text: str) -> httpx.Response:
            return await client.post(CHAT, json={"messages": text, "max_tokens": 20})

        replies = many(server.url, [lambda client, t=t: ask(client, t) for t in [bad, *["fine"] * 30]])
        statuses = [reply.status_code for reply in replies]  # type: ignore[attr-defined]
        assert statuses == [500] + [200] * 30
        assert replies[0].json()["error"]["code"] == "engine_error"  # type: ignore[attr-defined]
        server.wait_idle()


@contextmanager
def server_process(
    folder: Path, drain_s: float, delay_s: float
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port_file = folder / "port"
    script = Path(__file__).with_name("server_process.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(port_file), str(drain_s), str(delay_s)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + PATIENCE_S
        while not port_file.exists():
            assert process.poll() is None and time.monotonic() < end, "the server did not start"
            time.sleep(0.02)
        url = f"http://127.0.0.1:{port_file.read_text()}"
        while True:
            try:
                httpx.get(url + "/health", timeout=30)
                break
            except httpx.TransportError:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.05)
        yield process, url
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


class Background(threading.Thread):
    """A streamed request in a thread: its status, the lines that came, and what broke it."""

    def __init__(self, url: str, count: int, text: str = "tell me all") -> None:
        super().__init__(daemon=True)
        self.url, self.count, self.text = url, count, text
        self.lines: list[str] = []
        self.error: Exception | None = None
        self.start()
        while not self.lines and self.is_alive():
            time.sleep(0.01)

    def run(self) -> None:
        body = {"messages": self.text, "max_tokens": self.count, "stream": True}
        try:
            with httpx.stream("POST", self.url + CHAT, json=body, timeout=PATIENCE_S) as reply:
                for line in reply.iter_lines():
                    if line:
                        self.lines.append(line)
        except httpx.HTTPError as e:
            self.error = e


def refuses(url: str) -> bool:
    """Whether nobody listens there any more."""
    try:
        httpx.get(url + "/health")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        pass
    return False


@pytest.mark.parametrize("case", ["I94-engine-death"])
def test_engine_death(case: str, tmp_path: Path) -> None:
    with server_process(tmp_path, 30, 0.05) as (process, url):
        pending = Background(url, 400)
        assert httpx.post(url + CHAT, json={"messages": "hello"}).status_code == 503
        health = httpx.get(url + "/health")
        assert health.status_code == 503
        assert health.json()["error"]["type"] == "service_unavailable_error"
        pending.join(PATIENCE_S)
        assert '"code":"unavailable"' in pending.lines[-1] and "DONE" not in pending.lines[-1]
        assert process.wait(PATIENCE_S) == 70


@pytest.mark.parametrize("case", ["I95-sigterm-drains"])
def test_sigterm_drains(case: str, tmp_path: Path) -> None:
    with server_process(tmp_path, 30, 0.02) as (process, url):
        pending = Background(url, 50)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(url), "a server that lets nobody new in")
        pending.join(PATIENCE_S)
        assert pending.error is None and pending.lines[-1] == "data: [DONE]"
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("case", ["I95-sigterm-has-deadline"])
def test_sigterm_has_a_deadline(case: str, tmp_path: Path) -> None:
    with server_process(tmp_path, 0.5, 10_000) as (process, url):  # no token ever comes
        pending = Background(url, 450)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        pending.join(PATIENCE_S)
        assert "The server is ending" in pending.lines[-1]


@pytest.mark.parametrize("case", ["I95-second-signal-ends"])
def test_second_signal_ends_at_once(case: str, tmp_path: Path) -> None:
    with server_process(tmp_path, 10_000, 10_000) as (
        process,
        url,
    ):  # neither the answer nor the drain would end
        Background(url, 450)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(url), "a server that drains")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM


@pytest.mark.parametrize("case", ["I96-streams-cross"])
def test_streams_do_not_cross(case: str) -> None:
    with live_server(FakeEngine(delay_s=0.001, context_length=4000)) as server:
        chosen = random.Random(0)
        asked = [("x" * chosen.randrange(1, 40), chosen.randrange(1, 60)) for _ in range(200)]
        jobs = [lambda client, t=text, n=count: _stream(client, t, n) for text, count in asked]
        assert many(server.url, jobs) == [expected(text, count) for text, count in asked]
        ids = [request.id for request in server.engine.requests]
        assert len(set(ids)) == len(ids)
        server.wait_idle()


@pytest.mark.parametrize("case", ["I97-soak-with-random"])
def test_soak_with_random_disconnects(case: str) -> None:
    engine = FakeEngine(delay_s=0.002, context_length=4000)
    with live_server(engine) as server:
        chosen = random.Random(1)

        async def one(client: httpx.AsyncClient) -> str:
            kind, count = chosen.random(), chosen.randrange(1, 40)
            body = {
                "messages": "x" * chosen.randrange(1, 30),
                "max_tokens": count,
                "n": chosen.choice([1, 1, 1, 3]),
            }
            if kind < 0.3:  # left at a random moment, whole
                try:
                    await client.post(CHAT, json={**body, "max_tokens": 3000}, timeout=chosen.random() * 0.2)
                except httpx.TimeoutException:
                    return "left"
            if kind < 0.6:  # left after some chunks of a stream
                lines = chosen.randrange(0, 20)
                async with client.stream(
                    "POST", CHAT, json={**body, "max_tokens": 3000, "stream": True}
                ) as reply:
                    async for _ in reply.aiter_lines():
                        lines -= 1
                        if lines < 0:
                            return "left"
            reply = await client.post(CHAT, json=body)
            assert reply.status_code == 200
            assert reply.json()["usage"]["completion_tokens"] == count * body["n"]  # type: ignore[operator]
            return "answered"

        many(server.url, [one] * 50)
        server.wait_idle()
        before = _held(server)
        outcome: list[object] = []
        for _ in range(max(1, SOAK // 100)):
            outcome += many(server.url, [one] * 100)
        assert {type(o) for o in outcome} == {str}, [o for o in outcome if not isinstance(o, str)][:3]
        assert outcome.count("left") > len(outcome) / 3
        server.wait_idle()
        after = _held(server)
        assert after["tasks"] <= before["tasks"] + 2
        assert after["threads"] <= before["threads"] + 2
        assert after["files"] <= before["files"] + 5
        assert after["rss_mib"] < before["rss_mib"] + 20 + SOAK / 200  # the fake engine keeps every request


def _held(server: LiveServer) -> dict[str, float]:
    import gc

    gc.collect()
    time.sleep(0.2)
    status = Path("/proc/self/status").read_text()
    return {
        "tasks": len(server.service.runs._tasks),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "rss_mib": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024,  # type: ignore[index]
    }


@pytest.mark.parametrize("case", ["I98-two-servers-share"])
def test_two_servers_share_nothing(case: str) -> None:
    with live_server(FakeEngine(0.001)) as one, live_server(FakeEngine(0.001)) as two:
        assert one.port != two.port
        for server in (one, two):
            reply = httpx.post(server.url + CHAT, json={"messages": "x", "max_tokens": 5})
            assert reply.json()["choices"][0]["message"]["content"] == expected("x", 5)


class StuckTokenizer(FakeTokenizer):
    """Does not come to an end before it is let go, as a tokenizer with a long text."""

    def __init__(self) -> None:
        self.go, self.inside = threading.Event(), threading.Semaphore(0)

    def apply_chat_template(self, messages, *more, **named):  # type: ignore[no-untyped-def]
        self.inside.release()
        assert self.go.wait(PATIENCE_S)
        return super().apply_chat_template(messages)


@pytest.mark.parametrize("case", ["I99-health-and-metrics"])
def test_health_and_metrics_answer_under_load(case: str) -> None:
    """While every thread that reads prompts is inside one, and others wait: answers do not come by luck of time."""
    tokenizer = StuckTokenizer()
    config = ServeConfig(limits=Limits(prompt_s=10_000))
    with live_server(FakeEngine(), config, tokenizer) as server:
        threads = [
            threading.Thread(
                target=httpx.post,
                args=(server.url + CHAT,),
                kwargs={"json": {"messages": "x", "max_tokens": 50}, "timeout": PATIENCE_S},
            )
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for _ in range(4):  # threads that read prompts
            assert tokenizer.inside.acquire(timeout=PATIENCE_S)
        for path in ("/health", "/metrics", "/v1/models") * 5:
            assert httpx.get(server.url + path).status_code == 200
        assert not server.engine.requests or all(r.id.startswith("health") for r in server.engine.requests)
        tokenizer.go.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        server.wait_idle()


@pytest.mark.parametrize("case", ["I99-hung-engine-healthy"])
def test_a_hung_engine_is_no_healthy_one(case: str) -> None:
    engine = FakeEngine()
    with live_server(engine, ServeConfig(limits=Limits(health_s=0.3))) as server:
        assert httpx.get(server.url + "/health").status_code == 200
        engine.hangs = True
        server.service.health._proved = server.service.runs.last_token = -1e9  # long ago
        reply = httpx.get(server.url + "/health")
        assert reply.status_code == 503 and "done nothing" in reply.text
        engine.hangs = False
        wait_until(lambda: httpx.get(server.url + "/health").status_code == 200, "a healthy engine")
