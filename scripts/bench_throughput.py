"""Throughput of the engine on one GPU (two with --parts tp), on models of random weights made there.

    python scripts/bench_throughput.py [--parts checks,static,chain,memory,dynamic,70b,peer] [--seconds 420] [--out benchmarks]

First the engine's GPU tests run; a failure is recorded and shown on top. Then, in one process and one run: decode and prefill of the 7B
shape at fp16, int4, int4 + KV8; what fits under 24 GiB; a committed trace of dialogue lengths under the same cap; the 70B shape with 8
sequences of 32K; transformers' fp16 `generate` with static cache and compile. `--seconds` bounds the run: a part that would begin later
is named as left out. Writes throughput.json and throughput.md, and, with --profile, the kernels of a decode step.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from convert.errors import ResourceError  # noqa: E402
from engine.config import GIB, EngineConfig  # noqa: E402
from engine.device_limits import copy_bandwidth, peak_gib, reset_peak  # noqa: E402
from engine.random_weights import SHAPES  # noqa: E402
from engine.source import ModelSource  # noqa: E402
from engine.throughput import Bench, Contender, open_bench  # noqa: E402
from engine.throughput_rows import ThroughputRow, row_document, rows_table  # noqa: E402
from engine.trace import read_trace  # noqa: E402
from kernels import w4a16  # noqa: E402

TRACE = ROOT / "benchmarks" / "dialogues.trace.jsonl"
START = time.monotonic()
CAP_BYTES = 24 * GIB
KINDS = {"fp16": ("fp16", 16), "int4": ("int4", 16), "int4+KV8": ("int4", 8)}
STATIC = EngineConfig(
    device="cuda",
    max_batch=64,
    max_step_tokens=4096,
    context_length=1024,
    graph_batches=(1, 8, 16, 64),
    warm_up=False,
)
DYNAMIC = EngineConfig(
    device="cuda",
    max_batch=256,
    max_step_tokens=2048,
    context_length=4096,
    cache_fraction=0.97,
    memory_cap_bytes=CAP_BYTES,
    graph_batches=(8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256),
)
# tok/s and ratio that decode must reach, by batch: (fp16 tok/s, int4 + KV8 over fp16)
BARS = {1: (0.8 * 227, 2.7), 8: (1180, 2.5), 16: (2070, 2.3), 64: (4900, 1.7)}


def log(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


@dataclass
class Report:
    """What a run found, in the order it was found."""

    rows: list[ThroughputRow] = field(default_factory=list)
    held: list[dict[str, Any]] = field(default_factory=list)  # name, bar, value, holds
    notes: list[str] = field(default_factory=list)

    def add(self, row: ThroughputRow) -> ThroughputRow:
        self.rows.append(row)
        share = "" if row.bandwidth_share is None else f", {row.bandwidth_share:.0%} of the limit"
        log(
            f"{row.shape} {row.weights} kv {row.kv} {row.mode} batch {row.batch}: {row.tok_per_s:,.0f} tok/s{share}"
        )
        return row

    def judge(self, name: str, value: float, bar: float, *, at_most: bool = False) -> None:
        holds = value <= bar if at_most else value >= bar
        self.held.append({"name": name, "bar": bar, "value": value, "holds": holds, "at_most": at_most})
        log(
            f"{'holds' if holds else 'MISSED'}: {name}: {value:.2f} against {'at most' if at_most else 'at least'} {bar:.2f}"
        )


def contender(kind: str, config: EngineConfig, shape: str = "7b") -> Contender:
    weights, kv_bits = KINDS[kind]
    return Contender(ModelSource(random_weights=shape, weights=weights), replace(config, kv_bits=kv_bits))


@contextmanager
def opened(kind: str, config: EngineConfig, bandwidth: float, shape: str = "7b") -> Iterator[Bench]:
    began = time.monotonic()
    with open_bench(contender(kind, config, shape), bandwidth) as bench:
        weights = bench.weight_bytes() / GIB
        log(
            f"{shape} {kind} loaded in {time.monotonic() - began:.1f} s: {weights:.2f} GiB of weights a step, "
            f"{bench.core.blocks.total} blocks of cache"
        )
        yield bench
    torch.cuda.set_per_process_memory_fraction(1.0)


def run_checks(report: Report) -> None:
    """The GPU tests of the engine, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_engine_gpu.py", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    tail = done.stdout.strip().splitlines()[-12:]
    print("\n".join(tail), flush=True)
    report.judge("tests/gpu/test_engine_gpu.py: exit code", done.returncode, 0, at_most=True)


def run_static(report: Report, bandwidth: float, profile: Path | None) -> None:
    """Decode at prompt 512, median of 128 steps."""
    speeds: dict[tuple[str, int], float] = {}
    for kind in KINDS:
        with opened(kind, STATIC, bandwidth) as bench:
            if kind == "fp16":
                report.notes.append(
                    f"weights-only limit of fp16 at batch 1: {bandwidth / bench.weight_bytes():.0f} tok/s at the measured copy bandwidth"
                )
                limit = bandwidth / bench.weight_bytes()
            if kind == "int4":
                whole = bench.weight_bytes() + bench.runner.model.embedding.nbytes
                report.judge("GiB of 7B int4 weights, embedding included", whole / GIB, 3.9, at_most=True)
            for batch in BARS:
                bench.static(batch, 512, 2)  # compiles and captures
                row = report.add(bench.static(batch, 512, 128))
                speeds[kind, batch] = row.tok_per_s
            if profile is not None:
                write_profile(bench, profile / f"decode-{kind.replace('+', '-').lower()}.txt")
        if kind == "fp16":
            report.judge("fp16 decode at batch 1 over the weights-only limit", speeds["fp16", 1] / limit, 0.8)
    report.judge("int4+KV8 decode tok/s at batch 1", speeds["int4+KV8", 1], 500)
    for batch, (least, ratio) in BARS.items():
        report.judge(f"fp16 decode tok/s at batch {batch}", speeds["fp16", batch], least)
        for kind in ("int4+KV8", "int4"):
            value = speeds[kind, batch] / speeds["fp16", batch]
            if kind == "int4+KV8":
                report.judge(f"{kind} over fp16 at batch {batch}", value, ratio)
            else:
                report.notes.append(f"int4 with fp16 KV over fp16 at batch {batch}: {value:.2f}x")


def write_profile(bench: Bench, path: Path) -> None:
    """Time by kernel of 32 decode steps at batch 1."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        bench.static(1, 512, 32)
    table = profile.key_averages().table(sort_by="device_time_total", row_limit=40, max_name_column_width=90)
    path.write_text(table)


def run_chain(report: Report, bandwidth: float) -> None:
    """Decode with each way of starting an int4 product behind its neighbours, in place of what the table says of each shape.

    The table's choice was timed on products alone; in a step most of them stand behind a norm, which leaves the memory idle.
    """
    table = w4a16.table_for
    for mode in ("table", "early", "late", "never"):

        def forced(name: str, mode: str = mode) -> tuple[w4a16.Entry, ...]:
            entries = table(name)
            if mode == "table":
                return entries
            return tuple(
                replace(e, tile=replace(e.tile, dependent=mode)) if hasattr(e.tile, "dependent") else e
                for e in entries
            )

        w4a16.table_for = forced  # type: ignore[assignment]
        w4a16._tile.cache_clear()
        try:
            with opened("int4+KV8", STATIC, bandwidth) as bench:
                for batch in BARS:
                    bench.static(batch, 512, 2)
                    row = report.add(bench.static(batch, 512, 64))
                    report.notes.append(
                        f"int4+KV8, batch {batch}, products started by {mode}: {row.tok_per_s:,.0f} tok/s"
                    )
        finally:
            w4a16.table_for = table
            w4a16._tile.cache_clear()


def run_memory(report: Report, bandwidth: float) -> None:
    """8 sequences of 8K under a cap of 24 GiB: int4 + KV8 runs after a real prefill, fp16 does not fit."""
    config = replace(
        STATIC,
        max_batch=8,
        max_step_tokens=2048,
        context_length=8192,
        cache_fraction=0.98,
        memory_cap_bytes=CAP_BYTES,
        graph_batches=(8,),
    )
    with opened("int4+KV8", config, bandwidth) as bench:
        row = report.add(bench.static(8, 8000, 64))
        report.judge("GiB, 7B int4+KV8, 8 x 8K, under 24 GiB", row.memory_gib or 0.0, 24, at_most=True)
    fits = True
    try:
        with opened("fp16", config, bandwidth) as bench:
            bench.static(8, 8000, 64)
    except ResourceError as error:
        fits = False
        report.notes.append(f"7B fp16, 8 x 8K, 24 GiB: {error}")
    torch.cuda.set_per_process_memory_fraction(1.0)
    report.judge("7B fp16, 8 x 8K, runs under 24 GiB (1: yes)", float(fits), 0, at_most=True)


def run_dynamic(report: Report, bandwidth: float, requests: int) -> None:
    """The same trace at a rate above what either can serve, under the same cap."""
    trace = read_trace(TRACE)[:requests]
    speeds = {}
    for kind in ("fp16", "int4+KV8"):
        with opened(kind, DYNAMIC, bandwidth) as bench:
            bench.dynamic(trace[:40], rate=1000.0)  # compiles
            row = report.add(bench.dynamic(trace, rate=200.0))
            speeds[kind] = row.req_per_s or 0.0
            retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
            report.notes.append(
                f"dynamic, {kind}: {bench.core.blocks.total} blocks, {row.preemptions} preemptions, {retries} allocations that "
                "had to wait for cached memory to be freed"
            )
            busy = bench.dynamic(trace[: requests // 3], rate=200.0, profile=True).busy_share
            report.judge(f"GPU busy under load, {kind}", busy or 0.0, 0.95)
    report.judge("requests per second, int4+KV8 over fp16", speeds["int4+KV8"] / speeds["fp16"], 1.8)


def run_70b(report: Report, bandwidth: float) -> None:
    """The 70B shape with 8 sequences of 32K, cache filled with random values."""
    config = replace(
        STATIC,
        max_batch=8,
        max_step_tokens=256,
        context_length=32768,
        cache_bytes=8 * 32768 * 80 * 8 * (2 * 128 + 8),
        memory_cap_bytes=79 * GIB,  # what an 80 GB H100 has
        graph_batches=(8,),
    )
    reset_peak(torch.device("cuda", 0))
    with opened("int4+KV8", config, bandwidth, "70b") as bench:
        loading = peak_gib(bench.device)
        row = report.add(bench.static(8, 32768 - 64, 32, random_cache=True))
        report.judge(
            "GiB, 70B int4+KV8, 8 x 32K, allocator peak",
            max(loading, row.memory_gib or 0.0),
            77,
            at_most=True,
        )


def run_peer(report: Report, batches: tuple[int, ...], deadline: float) -> None:
    """transformers' own fp16 Llama of the same shape: `generate`, static cache, compiled decode."""
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    shape = SHAPES["7b"]
    hf = transformers.LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position,
    )
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(hf).eval()
    torch.set_default_dtype(torch.float32)
    for batch in batches:
        if time.monotonic() - START > deadline:
            report.notes.append(f"transformers at batch {batch}: left out, no time")
            continue
        ids = torch.randint(0, shape.vocab_size, (batch, 512), device="cuda")

        def generate(tokens: int, ids: torch.Tensor = ids) -> float:
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
            )
            torch.cuda.synchronize()
            return time.perf_counter() - began

        # One token is prefill alone and compiles nothing; decode is compiled by the first long run.
        generate(129)
        short, long = (statistics.median(generate(tokens) for _ in range(3)) for tokens in (1, 129))
        step_s = (long - short) / 128
        row = ThroughputRow(
            "transformers", "7b (random)", 1, "static", "fp16", "fp16", "", batch, 512, 128, batch / step_s,
            itl_ms_p50=1e3 * step_s, note="generate, static cache, compiled; mean of 128 steps, prefill subtracted",
        )  # fmt: skip
        report.add(row)
        ours = [
            r
            for r in report.rows
            if r.impl == "ours" and (r.weights, r.mode, r.batch) == ("fp16", "static", batch)
        ]
        if ours:
            report.judge(
                f"our fp16 over transformers' at batch {batch}", ours[0].tok_per_s / row.tok_per_s, 1.0
            )


def run_tp(report: Report, bandwidth: float) -> None:
    """70B int4 decode on one GPU and on two."""
    speeds: dict[tuple[int, int], float] = {}
    for tp in (1, 2):
        config = replace(STATIC, tp=tp, max_batch=16, graph_batches=(1, 16), cache_bytes=16 * GIB // tp)
        with opened("int4+KV8", config, bandwidth, "70b") as bench:
            for batch in (1, 16):
                bench.static(batch, 512, 2)
                speeds[tp, batch] = report.add(bench.static(batch, 512, 64)).tok_per_s
    for batch in (1, 16):
        report.notes.append(
            f"70B int4+KV8, tp 2 over tp 1 at batch {batch}: {speeds[2, batch] / speeds[1, batch]:.2f}x"
        )


def document(report: Report, bandwidth: float) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    import triton

    return {
        "command": " ".join(["python", "scripts/bench_throughput.py", *sys.argv[1:]]),
        "commit": commit,
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(0),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "copy_bandwidth_tb_per_s": bandwidth / 1e12,
        "rows": [row_document(row) for row in report.rows],
        "must_hold": report.held,
        "notes": report.notes,
    }


def write(report: Report, bandwidth: float, out: Path) -> None:
    found = document(report, bandwidth)
    (out / "throughput.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        "# Throughput",
        "",
        f"{found['device']}, {found['date']}, torch {found['versions']['torch']}, triton {found['versions']['triton']}; copy bandwidth "
        f"{bandwidth / 1e12:.2f} TB/s (read + write). Models of random weights: speed and memory only.",
        "",
        "| shape | impl | weights | KV | mode | batch | in/out | tok/s | req/s | TTFT ms p50 / p99 | ITL ms p50 / p99 | prefill tok/s | GiB | of limit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in report.rows:
        cells = [
            r.shape, r.impl, r.weights, r.kv, r.mode, str(r.batch), f"{r.input_len}/{r.output_len}", f"{r.tok_per_s:,.0f}",
            cell(r.req_per_s, ".2f"), f"{cell(r.ttft_ms_p50, ',.0f')} / {cell(r.ttft_ms_p99, ',.0f')}",
            f"{cell(r.itl_ms_p50, '.2f')} / {cell(r.itl_ms_p99, '.2f')}", cell(r.prefill_tok_per_s, ",.0f"),
            cell(r.memory_gib, ".2f"), cell(r.bandwidth_share, ".0%"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| must hold | bar | measured | |", "| --- | --- | --- | --- |"]
    for h in report.held:
        bar = f"{'<=' if h['at_most'] else '>='} {h['bar']:g}"
        lines.append(
            f"| {h['name']} | {bar} | {h['value']:.3g} | {'holds' if h['holds'] else '**missed**'} |"
        )
    lines += ["", *(f"* {note}" for note in report.notes), ""]
    (out / "throughput.md").write_text("\n".join(lines))


def cell(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="checks,static,memory,dynamic,70b,peer")
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--requests", type=int, default=500, help="of the trace")
    parser.add_argument("--peer-batches", default="1,16")
    parser.add_argument("--profile", action="store_true", help="also write time by kernel of decode steps")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device: this benchmark needs one.", file=sys.stderr)
        return 4
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report()
    device = torch.device("cuda", 0)
    bandwidth = copy_bandwidth(device)
    torch.cuda.empty_cache()
    log(f"{torch.cuda.get_device_name(0)}: copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    peers = tuple(int(part) for part in args.peer_batches.split(","))
    parts: dict[str, Callable[[], None]] = {
        "checks": lambda: run_checks(report),
        "static": lambda: run_static(report, bandwidth, args.out if args.profile else None),
        "chain": lambda: run_chain(report, bandwidth),
        "memory": lambda: run_memory(report, bandwidth),
        "dynamic": lambda: run_dynamic(report, bandwidth, args.requests),
        "70b": lambda: run_70b(report, bandwidth),
        "peer": lambda: run_peer(report, peers, args.seconds),
        "tp": lambda: run_tp(report, bandwidth),
    }
    failed = 0
    for name in args.parts.split(","):
        if time.monotonic() - START > args.seconds:
            report.notes.append(f"part {name}: left out, no time")
            continue
        try:
            parts[name]()
        except Exception as error:  # one part's failure must not lose what the others measured
            failed += 1
            report.notes.append(f"part {name} failed: {type(error).__name__}: {error}")
            log(report.notes[-1])
            import traceback

            traceback.print_exc()
        write(report, bandwidth, args.out)
    Console(width=200).print(rows_table(report.rows))
    missed = [h["name"] for h in report.held if not h["holds"]]
    log(
        f"{len(report.held) - len(missed)} of {len(report.held)} bars hold"
        + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
