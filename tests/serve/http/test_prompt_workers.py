"""Prompts are read in processes of their own: what one of them does to itself, the server and other clients do not feel."""

import asyncio
import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from live_server import LiveServer, live_server, wait_until
from tiny_models import tokenizer_document

from convert.errors import InputError, TmqError
from convert.tokenizer.tokenizer import load_tokenizer
from serve.config import ServeConfig
from serve.limits import Limits
from serve.prompts.encoder import TemplateTraits
from serve.prompts.pool import Busy, WorkerFailed, WorkerPool

CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if messages[0].content == 'power' %}{% set x = 9 ** 9 %}{{ 9 ** x }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools|tojson }}{% endif %}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HI = [{"role": "user", "content": "hi <|im_end|>"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_document()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"})
    )
    return folder


@contextlib.asynccontextmanager
async def pool(folder: Path, **options: Any) -> Any:
    workers = WorkerPool(folder, load_tokenizer(folder).vocab_size, **options)
    try:
        yield workers
    finally:
        await workers.close()


def test_ids_are_those_of_the_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)

    async def run() -> None:
        async with pool(folder) as workers:
            assert await workers.traits() == TemplateTraits.of(tokenizer)
            assert (await workers.traits()).variables == ("enable_thinking",)
            text = "é 你好 <|im_end|> \ud7ff \n"
            assert await workers.text(text, None) == tokenizer.encode_plain(text, None)
            assert await workers.chat(HI, None, {}) == tokenizer.apply_chat_template(HI)
            tools = [{"type": "function", "function": {"name": "f"}}]
            got = await workers.chat(HI, tools, {"enable_thinking": False})
            assert got == tokenizer.apply_chat_template(HI, tools=tools, variables={"enable_thinking": False})
            many = await asyncio.gather(*(workers.text("a" * i, False, f"c{i % 5}") for i in range(100)))
            assert [len(ids) for ids in many] == [len(tokenizer.encode_plain("a" * i)) for i in range(100)]
            assert not workers.kills

    asyncio.run(run())


def test_a_template_without_end_is_refused_by_the_sandbox_and_one_beyond_its_time_is_killed(
    folder: Path,
) -> None:
    async def run() -> None:
        async with pool(folder, timeout_s=0.5, workers=3) as workers:
            with pytest.raises(InputError, match="more than a template may"):
                await workers.chat([{"role": "user", "content": "power"}], None, {})
            assert not workers.kills
            with pytest.raises(asyncio.TimeoutError):
                await workers.chat([{"role": "user", "content": "loop"}], None, {})
            assert workers.kills == {"time": 1}
            assert await workers.chat(HI, None, {}) == load_tokenizer(folder).apply_chat_template(HI)

    asyncio.run(run())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_worker_that_dies_or_stops_costs_one_job(folder: Path, how: int) -> None:
    async def run() -> None:
        async with pool(folder, workers=1, timeout_s=3.0) as workers:
            await workers.text("warm", None)
            (worker,) = workers._alive
            os.kill(worker.process.pid, how)
            if how == signal.SIGKILL:
                await worker.process.wait()  # it died between two jobs: nobody notices
            else:
                with pytest.raises(asyncio.TimeoutError):
                    await workers.text("x", None)
            assert await workers.text("ab", False) == load_tokenizer(folder).encode_plain("ab")
            assert len(workers._alive) == 1 and worker not in workers._alive

    asyncio.run(run())


def test_a_worker_that_dies_inside_a_job_fails_that_job(folder: Path) -> None:
    async def run() -> None:
        async with pool(folder, workers=1, timeout_s=500.0) as workers:
            await workers.text("warm", None)
            (worker,) = workers._alive
            job = asyncio.create_task(workers.chat([{"role": "user", "content": "loop"}], None, {}))
            while not workers._tasks:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            os.kill(worker.process.pid, signal.SIGKILL)
            with pytest.raises(WorkerFailed):
                await job
            assert workers.kills == {"failure": 1}

    asyncio.run(run())


def test_one_client_leaves_a_worker_to_the_others(folder: Path) -> None:
    """One client's endless templates have one of two workers; another client's prompts pass."""

    async def run() -> None:
        async with pool(folder, workers=2, timeout_s=500.0) as workers:
            loops = [
                asyncio.create_task(workers.chat([{"role": "user", "content": "loop"}], None, {}, "mallory"))
                for _ in range(8)
            ]
            for _ in range(5):
                assert await workers.text("x", False, "alice")
            assert not any(loop.done() for loop in loops)
            for loop in loops:
                loop.cancel()

    asyncio.run(run())


def test_prompts_that_wait_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.prompts.pool.JOBS_PER_CLIENT", 3)

    async def run() -> None:
        async with pool(folder) as workers:
            waiting = [asyncio.create_task(workers.text("x", False, "a")) for _ in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(Busy):
                await workers.text("x", False, "a")
            assert await workers.text("x", False, "b")
            await asyncio.gather(*waiting)
            assert await workers.text("x", False, "a")

    asyncio.run(run())


def test_a_worker_that_cannot_start_says_so(tmp_path: Path) -> None:
    async def run() -> None:
        workers = WorkerPool(tmp_path / "nowhere", 10)
        for _ in range(3):
            with pytest.raises(TmqError, match="does not start"):
                await workers.text("x", None)
        assert not workers._alive
        await workers.close()

    asyncio.run(run())


@pytest.fixture
def server(folder: Path) -> Iterator[LiveServer]:
    workers = WorkerPool(folder, load_tokenizer(folder).vocab_size, timeout_s=1.0)
    engine = FakeEngine(delay_s=0.01, context_length=20_000)
    with live_server(engine, ServeConfig(limits=Limits(prompt_s=1.0)), workers) as server:  # type: ignore[arg-type]
        yield server
    assert not workers._alive  # the end of the server is that of its workers


@pytest.mark.parametrize("attack", ["loop", "power", "text", "tokenize"])
def test_streams_and_health_go_on_while_prompts_are_read(server: LiveServer, attack: str) -> None:
    """During each attack the event loop turns: another client's stream advances and /health answers."""
    body: dict[str, Any] = {"messages": attack, "max_tokens": 2}
    path = CHAT
    if attack in ("text", "tokenize"):
        path = "/tokenize" if attack == "tokenize" else "/v1/completions"
        body = {"prompt": "word " * 200_000}
    with httpx.stream(
        "POST", server.url + CHAT, json={"messages": "x", "max_tokens": 15_000, "stream": True}, timeout=60
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        replies: list[httpx.Response] = []
        attackers = [
            threading.Thread(
                target=lambda: replies.append(httpx.post(server.url + path, json=body, timeout=120))
            )
            for _ in range(4)
        ]
        for thread in attackers:
            thread.start()
        while any(thread.is_alive() for thread in attackers):
            assert httpx.get(server.url + "/health", timeout=60).status_code == 200
            assert next(line for line in lines if line.startswith("data: {"))
        allowed = {200, 400} if attack == "tokenize" else {400}  # it may be done within its time
        assert {reply.status_code for reply in replies} <= allowed and len(replies) == 4
    wait_until(lambda: not server.engine.live, "the end of the stream")


def test_a_text_beyond_the_context_is_refused_before_it_is_tokenized(folder: Path) -> None:
    workers = WorkerPool(folder, load_tokenizer(folder).vocab_size)
    with live_server(FakeEngine(context_length=512), tokenizer=workers) as server:  # type: ignore[arg-type]
        for path, body in (
            ("/v1/completions", {"prompt": "a" * 40_000}),
            (CHAT, {"messages": [{"role": "user", "content": "a" * 20_000}] * 2}),
        ):
            reply = httpx.post(server.url + path, json=body, timeout=60)
            assert reply.status_code == 400 and "32768" in reply.json()["error"]["message"]
            assert reply.json()["error"]["code"] == "context_length_exceeded"
        assert not workers._alive, "no worker was asked"
