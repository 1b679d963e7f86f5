"""The parts of `bench_throughput.py` that run in its own process: engine checks, decode, memory, traces, 70B, the peer, two GPUs."""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from throughput_report import CAP_BYTES, DYNAMIC, KINDS, ROOT, STATIC, TRACE, Report, opened

from convert.errors import ResourceError
from engine.config import GIB
from engine.measure.device_limits import peak_gib, reset_peak
from engine.measure.throughput import Bench
from engine.measure.throughput_rows import ThroughputRow
from engine.measure.trace import read_trace
from engine.model.random_weights import SHAPES
from kernels.w4a16 import product as w4a16
from kernels.w4a16.unpack import DEPENDENT_MODES

# tok/s and ratio that decode must reach, by batch: (fp16 tok/s, int4 + KV8 over fp16)
BARS = {1: (0.8 * 227, 2.7), 8: (1180, 2.5), 16: (2070, 2.3), 64: (4900, 1.7)}


def run_checks(report: Report, limit_s: float) -> None:
    """The GPU tests of the engine, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_engine_gpu.py", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit_s)
    tail = done.stdout.strip().splitlines()[-12:]
    print("\n".join(tail), flush=True)
    failed = abs(done.returncode)  # a signal is a negative code
    report.judge("tests/gpu/test_engine_gpu.py: exit code", failed, 0, at_most=True)


def run_static(report: Report, profile: Path | None) -> None:
    """Decode at prompt 512, median of 128 steps."""
    speeds: dict[tuple[str, int], float] = {}
    for kind in KINDS:
        with opened(kind, STATIC, report) as bench:
            if kind == "fp16":
                report.note(
                    f"weights-only limit of fp16 at batch 1: {report.bandwidth / bench.weight_bytes():.0f} tok/s at the measured copy bandwidth"
                )
                limit = report.bandwidth / bench.weight_bytes()
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
                report.note(f"int4 with fp16 KV over fp16 at batch {batch}: {value:.2f}x")


def write_profile(bench: Bench, path: Path) -> None:
    """Time by kernel of 32 decode steps at batch 1."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        bench.static(1, 512, 32)
    table = profile.key_averages().table(sort_by="device_time_total", row_limit=40, max_name_column_width=90)
    path.write_text(table)


def run_chain(report: Report) -> None:
    """Decode with each way of starting an int4 product behind its neighbours, in place of what the table says of each shape.

    The table's choice was timed on products alone; in a step most of them stand behind a norm, which leaves the memory idle.
    """
    table = w4a16.table_for
    for mode in ("table", *DEPENDENT_MODES):

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
            with opened("int4+KV8", STATIC, report) as bench:
                for batch in BARS:
                    bench.static(batch, 512, 2)
                    row = report.add(bench.static(batch, 512, 64))
                    report.note(
                        f"int4+KV8, batch {batch}, products started by {mode}: {row.tok_per_s:,.0f} tok/s"
                    )
        finally:
            w4a16.table_for = table
            w4a16._tile.cache_clear()


def run_memory(report: Report) -> None:
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
    with opened("int4+KV8", config, report) as bench:
        row = report.add(bench.static(8, 8000, 64))
        report.judge("GiB, 7B int4+KV8, 8 x 8K, under 24 GiB", row.memory_gib or 0.0, 24, at_most=True)
    fits = True
    try:
        with opened("fp16", config, report) as bench:
            bench.static(8, 8000, 64)
    except ResourceError as error:
        fits = False
        report.note(f"7B fp16, 8 x 8K, 24 GiB: {error}")
    report.judge("7B fp16, 8 x 8K, runs under 24 GiB (1: yes)", float(fits), 0, at_most=True)


def run_dynamic(report: Report, requests: int) -> None:
    """The same trace at a rate above what either can serve, under the same cap."""
    trace = read_trace(TRACE)[:requests]
    speeds = {}
    for kind in ("fp16", "int4+KV8"):
        with opened(kind, DYNAMIC, report) as bench:
            bench.dynamic(trace, rate=200.0)  # compiles and loads what the trace needs
            row = report.add(bench.dynamic(trace, rate=200.0))
            speeds[kind] = row.req_per_s or 0.0
            retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
            report.note(
                f"dynamic, {kind}: {bench.core.blocks.total} blocks, {row.preemptions} preemptions, {retries} allocations that "
                "had to wait for cached memory to be freed"
            )
            busy = bench.dynamic(trace[: requests // 3], rate=200.0, profile=True).busy_share
            report.judge(f"GPU busy under load, {kind}", busy or 0.0, 0.95)
    report.judge("requests per second, int4+KV8 over fp16", speeds["int4+KV8"] / speeds["fp16"], 1.8)


def run_70b(report: Report) -> None:
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
    with opened("int4+KV8", config, report, "70b") as bench:
        loading = peak_gib(bench.device)
        row = report.add(bench.static(8, 32768 - 64, 32, random_cache=True))
        report.judge(
            "GiB, 70B int4+KV8, 8 x 32K, allocator peak",
            max(loading, row.memory_gib or 0.0),
            77,
            at_most=True,
        )


def run_peer(report: Report, batches: tuple[int, ...]) -> None:
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
    torch.compiler.reset()  # compiled code holds the model


def run_tp(report: Report) -> None:
    """70B int4 decode on one GPU and on two."""
    speeds: dict[tuple[int, int], float] = {}
    for tp in (1, 2):
        config = replace(STATIC, tp=tp, max_batch=16, graph_batches=(1, 16), cache_bytes=16 * GIB // tp)
        with opened("int4+KV8", config, report, "70b") as bench:
            for batch in (1, 16):
                bench.static(batch, 512, 2)
                speeds[tp, batch] = report.add(bench.static(batch, 512, 64)).tok_per_s
    for batch in (1, 16):
        report.note(
            f"70B int4+KV8, tp 2 over tp 1 at batch {batch}: {speeds[2, batch] / speeds[1, batch]:.2f}x"
        )
