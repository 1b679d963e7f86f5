"""Part `served`: the trace through the HTTP server, beside the engine's own figure on the same trace in the same run.

The server runs in a process of its own around a `ProcessEngine`, as `tmq serve` does, on a model of random weights whose text is numbers.
Each request is one connection that streams /v1/completions; the client only looks for the beginnings of events, so that it is not what
is measured. Run as a program it is that server; its one argument is JSON: source, config.
"""

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from throughput_report import DYNAMIC, TRACE, Report, contender, log, opened  # noqa: E402

from engine.config import EngineConfig  # noqa: E402
from engine.measure.throughput_rows import ThroughputRow, percentile  # noqa: E402
from engine.measure.trace import TraceEntry, read_trace  # noqa: E402
from engine.source import ModelSource  # noqa: E402

STARTING_S = 120.0
GENTLE_SHARE = 0.7  # of the engine's requests a second: a load at which time to first token says something


class NumberTokenizer:
    """Prompts are given as token ids; text is one token a byte."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_plain(self, text: str, add_bos: bool | None = None) -> list[int]:
        return [byte % self.vocab_size for byte in text.encode()]

    def apply_chat_template(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        return self.encode_plain(" ".join(str(message["content"]) for message in messages))


def serve(first: dict[str, Any]) -> int:
    """Be the server: port on standard output once it listens and the model is loaded, until SIGTERM."""
    from engine.model.random_weights import shape_named
    from engine.process.parent import ProcessEngine
    from serve.config import ServeConfig
    from serve.http.server import bind, serve_forever, set_up_logging
    from serve.limits import Limits

    first["config"]["graph_batches"] = tuple(first["config"]["graph_batches"])
    source, config = ModelSource(**first["source"]), EngineConfig(**first["config"])
    limits = Limits(pending=4096, pending_per_client=4096)
    serving = ServeConfig(server_port=0, model_name="random", limits=limits, drain_s=1.0)
    set_up_logging("error")
    listener = bind(serving)
    assert source.random_weights is not None
    with ProcessEngine.start(source, config) as engine:
        print(listener.getsockname()[1], flush=True)
        tokenizer = NumberTokenizer(shape_named(source.random_weights).vocab_size)
        return serve_forever(engine, tokenizer, serving, listener)


class Client:
    """The trace as connections, with the times at which events came."""

    def __init__(self, port: int, trace: Sequence[TraceEntry], rate: float, vocab_size: int) -> None:
        rng = random.Random(0)
        self._port = port
        self._due = [entry.arrival_s / rate for entry in trace]
        self._bodies = [
            json.dumps({"prompt": rng.choices(range(vocab_size), k=entry.prompt_tokens), "max_tokens": entry.output_tokens,
                        "temperature": 0, "ignore_eos": True, "stream": True}).encode()
            for entry in trace
        ]  # fmt: skip
        self.first_s: list[float] = []
        self.gaps_s: list[float] = []
        self.elapsed_s = 0.0
        self._began = 0.0

    async def run(self) -> None:
        self._began = time.perf_counter()
        await asyncio.gather(
            *(self._ask(due, body) for due, body in zip(self._due, self._bodies, strict=True))
        )
        self.elapsed_s = time.perf_counter() - self._began

    async def _ask(self, due: float, body: bytes) -> None:
        await asyncio.sleep(max(0.0, self._began + due - time.perf_counter()))
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            rest = await reader.read(2000)
            raise RuntimeError(f"the server answered {status!r} {rest[-300:]!r}")
        last = 0.0
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                if last:
                    self.gaps_s.append(now - last)
                else:
                    self.first_s.append(now - self._began - due)
                last = now
        else:
            raise RuntimeError("the server ended a stream early")
        writer.close()


def run_served(
    report: Report, requests: int, kind: str = "int4+KV8", config: EngineConfig = DYNAMIC, shape: str = "7b"
) -> None:
    """The engine alone at a rate above what it can serve, the server at the same, then the server at a rate below."""
    trace = read_trace(TRACE)[:requests]
    with opened(kind, config, report, shape) as bench:
        bench.dynamic(trace, rate=200.0)  # compiles and loads what the trace needs
        own = report.add(bench.dynamic(trace, rate=200.0))
        vocab_size = bench.core.runner.vocab_size
    assert own.req_per_s is not None
    loaded = contender(kind, config, shape)
    first = json.dumps({"source": asdict(loaded.source), "config": asdict(loaded.config)})
    server = subprocess.Popen([sys.executable, __file__, first], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        port = _port_of(server)
        asyncio.run(_quiet(Client(port, trace, 200.0, vocab_size)))  # loads the same here
        busy = _measure(report, own, port, trace, 200.0, vocab_size)
        report.judge(
            "requests per second through the server over the engine's own",
            (busy.req_per_s or 0) / own.req_per_s,
            0.9,
        )
        _measure(report, own, port, trace[: requests // 2], GENTLE_SHARE * own.req_per_s, vocab_size)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _port_of(server: "subprocess.Popen[str]") -> int:
    assert server.stdout is not None
    began = time.monotonic()
    line = server.stdout.readline()
    if not line.strip().isdigit():
        raise RuntimeError(f"the server did not start (exit code {server.wait(STARTING_S)})")
    log(f"the server is up after {time.monotonic() - began:.1f} s")
    return int(line)


async def _quiet(client: Client) -> Client:
    await client.run()
    return client


def _measure(
    report: Report, own: ThroughputRow, port: int, trace: Sequence[TraceEntry], rate: float, vocab_size: int
) -> ThroughputRow:
    client = asyncio.run(_quiet(Client(port, trace, rate, vocab_size)))
    ttft, itl = [1e3 * s for s in client.first_s], [1e3 * s for s in client.gaps_s]
    tokens = sum(entry.output_tokens for entry in trace)
    return report.add(
        replace(
            own, tok_per_s=tokens / client.elapsed_s, req_per_s=len(trace) / client.elapsed_s,
            ttft_ms_p50=percentile(ttft, 50), ttft_ms_p99=percentile(ttft, 99), itl_ms_p50=percentile(itl, 50),
            itl_ms_p99=percentile(itl, 99), memory_gib=None, preemptions=None,
            note=f"through the HTTP server: {len(trace)} requests at {rate:.3g} a second",
        )
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(serve(json.loads(sys.argv[1])))
