"""A long run of `tmq serve` on the CPU: mixed requests, disconnects, bad input; memory and cache blocks must come back.

    nice -n 19 python scripts/soak_server.py [--minutes 10] [--clients 12] [--seed 0] [--out benchmarks/soak.json]

The model is the random one of the tests (two layers, byte tokenizer), so that hours of service pass in minutes: what is tried is the
server, the pipe and the engine's bookkeeping, not the products. Greedy answers are compared with the first one to the same prompt: on
the CPU they are equal whoever shares the batch. Exit code 1 where one of the claims does not hold.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import torch
from provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_models import random_tensors, tokenizer_document, write_model  # noqa: E402

CHAT, TEXT, SESSION = "/v1/chat/completions", "/v1/completions", "/v1/chat/interactive"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 264
BAD_BODIES: list[tuple[str, Any]] = [  # path, body; each must be answered with 4xx
    (CHAT, {"messages": []}),
    (CHAT, {"messages": "hi", "temperature": "warm"}),
    (CHAT, {"messages": "hi", "no_such_field": 1}),
    (CHAT, {"messages": "hi", "max_tokens": 10**9}),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 4000}]}),
    (CHAT, {"model": "another", "messages": "hi"}),
    (TEXT, {"prompt": [10**6]}),
    (TEXT, {"prompt": "hi", "n": 100}),
    (TEXT, [1, 2, 3]),
    ("/v1/nowhere", {}),
]
BAD_BYTES = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS to a plain port
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",  # cut short
    b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000 + b"\r\n\r\n",
    b"\0" * 64,
]


def write_tiny(folder: Path) -> Path:
    """The tests' random llama with a byte tokenizer and a chat template."""
    tensors = random_tensors("llama")
    generator = torch.Generator().manual_seed(1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = (torch.randn(VOCAB, 64, generator=generator) * 0.5).half()
    write_model(folder, tensors=tensors, vocab_size=VOCAB, eos_token_id=258, bos_token_id=256)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_document()))
    settings = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class Server:
    """The server under test, and what Linux says of it and of its engine."""

    def __init__(self, model: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "turbomind_quant.cli.tmq",
            "serve",
            str(model),
            "--server-port",
            "0",
            "--device",
            "cpu",
        ]
        command += [
            "--instance-num",
            "16",
            "--session-len",
            "256",
            "--max-pending",
            "64",
            "--log-level",
            "error",
        ]
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=self.log)
        end = time.monotonic() + 120
        while not (found := re.search(r"is served at (http\S+)", Path(self.log.name).read_text())):
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start:\n{Path(self.log.name).read_text()}")
            time.sleep(0.2)
        self.url = found[1]
        self.host, port = self.url.removeprefix("http://").split(":")
        self.port = int(port)
        pid = self.process.pid
        self.engine_pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def rss_mib(self) -> tuple[float, float]:
        """Resident memory of server and engine."""
        server, engine = (_rss_mib(pid) for pid in (self.process.pid, self.engine_pid))
        return server, engine

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def _rss_mib(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


class Soak:
    """Clients that do one thing after another until the time is up; every outcome is counted."""

    def __init__(self, server: Server, client: httpx.AsyncClient, seed: int) -> None:
        self.server, self.client, self.seed = server, client, seed
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []  # answers that should not be
        self.tokens = 0
        self._greedy: dict[str, str] = {}

    async def run(self, clients: int, until: float) -> None:
        await asyncio.gather(
            *(self._work(random.Random(self.seed * 1000 + i), until) for i in range(clients))
        )

    async def _work(self, rng: random.Random, until: float) -> None:
        acts: list[tuple[int, Callable[[random.Random], Awaitable[None]]]] = [
            (6, self._stream),
            (4, self._whole),
            (4, self._leave),
            (3, self._bad_body),
            (1, self._bad_bytes),
            (2, self._session),
            (1, self._look),
        ]
        weights, calls = zip(*acts, strict=True)
        while time.monotonic() < until:
            (act,) = rng.choices(calls, weights)
            try:
                await act(rng)
            except httpx.HTTPError as error:
                self._count(f"client error {type(error).__name__}")
                self.wrong.append(f"{act.__name__}: {error!r}")

    def _count(self, what: str) -> None:
        self.counts[what] += 1

    def _body(self, rng: random.Random) -> dict[str, Any]:
        number, length = rng.randrange(40), rng.choice([1, 3, 8, 20, 60])
        body = {"messages": f"Say {number}.", "max_tokens": length, "temperature": 0, "ignore_eos": True}
        if rng.random() < 0.4:  # drawn, with everything the sampler can do
            body |= {
                "temperature": 0.9, "top_p": 0.8, "top_k": rng.choice([0, 5, 300]), "repetition_penalty": 1.1,
                "presence_penalty": 0.5, "seed": number, "stop": ["zz"], "logprobs": True, "top_logprobs": 3,
            }  # fmt: skip
        return body

    def _judge(self, body: dict[str, Any], text: str) -> None:
        """A greedy text is the beginning of, or begins with, what the same prompt gave before."""
        if body["temperature"] != 0:
            return
        known = self._greedy.get(body["messages"], "")
        short, long = sorted((known, text.rstrip("\ufffd")), key=len)
        if not long.startswith(short):
            self.wrong.append(f"{body['messages']} gave {text!r}, before {known!r}")
        self._greedy[body["messages"]] = long

    async def _stream(self, rng: random.Random) -> None:
        body = self._body(rng)
        text = ""
        async with self.client.stream("POST", CHAT, json={**body, "stream": True}) as reply:
            if self._refused(reply):
                return
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:]).get("choices", []):
                        text += choice["delta"].get("content") or ""
        self._count("streams")
        self.tokens += body["max_tokens"]
        self._judge(body, text)

    async def _whole(self, rng: random.Random) -> None:
        body = self._body(rng)
        reply = await self.client.post(CHAT, json=body)
        if not self._refused(reply):
            self._count("answers")
            self.tokens += body["max_tokens"]
            self._judge(body, reply.json()["choices"][0]["message"]["content"])

    async def _leave(self, rng: random.Random) -> None:
        """Read a few lines of a long answer and go."""
        body = {
            "prompt": f"Tell {rng.randrange(100)}.",
            "max_tokens": 200,
            "ignore_eos": True,
            "stream": True,
        }
        async with self.client.stream("POST", TEXT, json=body) as reply:
            if self._refused(reply):
                return
            left = rng.randrange(1, 12)
            async for _ in reply.aiter_lines():
                left -= 1
                if not left:
                    break
        self._count("disconnects")

    async def _bad_body(self, rng: random.Random) -> None:
        path, body = rng.choice(BAD_BODIES)
        content = json.dumps(body)
        if rng.random() < 0.3:
            content = content[:-1]
        reply = await self.client.post(path, content=content, headers={"content-type": "application/json"})
        self._count("bad requests")
        if not 400 <= reply.status_code < 500:
            self.wrong.append(f"{path} {content[:60]}: {reply.status_code}")

    async def _bad_bytes(self, rng: random.Random) -> None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(self.server.host, self.server.port)
            writer.write(rng.choice(BAD_BYTES))
            await writer.drain()
            await asyncio.sleep(rng.random() * 0.2)
            writer.close()
            await writer.wait_closed()
        self._count("bad connections")

    async def _session(self, rng: random.Random) -> None:
        body = {
            "session_id": rng.randrange(1, 30),
            "prompt": "And?",
            "request_output_len": 8,
            "ignore_eos": True,
        }
        reply = await self.client.post(SESSION, json={**body, "stop": rng.random() < 0.3})
        if reply.status_code not in (200, 400, 409, 429):  # 400: the session is as long as the context
            self.wrong.append(f"{SESSION}: {reply.status_code} {reply.text[:100]}")
        self._count("session turns")

    async def _look(self, rng: random.Random) -> None:
        reply = await self.client.get(rng.choice(["/health", "/metrics", "/v1/models", "/", "/openapi.json"]))
        if reply.status_code != 200:
            self.wrong.append(f"{reply.url.path}: {reply.status_code}")
        self._count("looks")

    def _refused(self, reply: httpx.Response) -> bool:
        if reply.status_code == 429:
            self._count("429")
            return True
        if reply.status_code != 200:
            self.wrong.append(f"{reply.url.path}: {reply.status_code}")
            return True
        return False


async def soak(
    server: Server, minutes: float, clients: int, seed: int
) -> tuple[Soak, list[dict[str, Any]], dict[str, Any]]:
    """The run, a sample every few seconds, and what the server says once all have left."""
    limits = httpx.Limits(max_connections=clients + 4)
    samples: list[dict[str, Any]] = []
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        run = Soak(server, client, seed)
        began = time.monotonic()
        work = asyncio.create_task(run.run(clients, began + 60 * minutes))
        while not work.done():
            own, engine = server.rss_mib()
            samples.append(
                {"second": round(time.monotonic() - began), "server_rss_mib": own, "engine_rss_mib": engine}
            )
            await asyncio.wait([work], timeout=min(10.0, 6 * minutes))
        await work
        end = time.monotonic() + 60
        while True:
            left: dict[str, Any] = (await client.get("/health")).json()
            if (
                left["blocks_free"] == left["blocks_total"] and not left["waiting"]
            ) or time.monotonic() > end:
                return run, samples, left
            await asyncio.sleep(0.5)


def growth(samples: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Median of the second and of the last quarter, MiB: the first quarter fills caches."""
    values = [sample[name] for sample in samples]
    quarter = max(1, len(values) // 4)
    return statistics.median(values[quarter : 2 * quarter] or values), statistics.median(values[-quarter:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "soak.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(write_tiny(Path(folder) / "tiny"))
        httpx.post(server.url + CHAT, json={"messages": "hi", "max_tokens": 2}, timeout=60).raise_for_status()
        time.sleep(2.0)
        files = server.files()
        try:
            run, samples, left = asyncio.run(soak(server, args.minutes, args.clients, args.seed))
            time.sleep(2.0)  # the server sees the last connections close
            files_left = server.files()
        finally:
            code = server.end()
    row: dict[str, Any] = {
        "minutes": args.minutes,
        "clients": args.clients,
        "seed": args.seed,
        "tokens": run.tokens,
    }
    row |= {name.replace(" ", "_"): count for name, count in sorted(run.counts.items())}
    for name in ("server_rss_mib", "engine_rss_mib"):
        row[name + "_early"], row[name + "_late"] = growth(samples, name)
    row |= {"blocks_free": left["blocks_free"], "blocks_total": left["blocks_total"], "files_before": files}
    row |= {"files_after": files_left, "wrong_answers": len(run.wrong), "exit_code": code}
    holds = {
        "no wrong answer": not run.wrong,
        "all blocks free": left["blocks_free"] == left["blocks_total"],
        "server memory flat (8 MiB)": row["server_rss_mib_late"] <= row["server_rss_mib_early"] + 8,
        "engine memory flat (8 MiB)": row["engine_rss_mib_late"] <= row["engine_rss_mib_early"] + 8,
        "no open file left": files_left <= files + 2,
        "ended by SIGTERM with 0": code == 0,
    }
    command = f"python scripts/soak_server.py --minutes {args.minutes:g} --clients {args.clients} --seed {args.seed}"
    document = provenance(f"CPU, {os.cpu_count()} cores, busy with other work", command) | {
        "rows": [row],
        "holds": holds,
        "samples": samples[:: max(1, len(samples) // 20)],
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({"row": row, "holds": holds, "wrong": run.wrong[:10]}, indent=1))
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
