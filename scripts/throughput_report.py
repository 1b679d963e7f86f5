"""What a throughput run found, written as it is found; the models and settings that its parts share."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from convert.folder.files import atomic_write, write_json  # noqa: E402
from convert.folder.json_files import read_object  # noqa: E402
from engine.config import GIB, EngineConfig  # noqa: E402
from engine.measure.throughput import Bench, Contender, open_bench  # noqa: E402
from engine.measure.throughput_rows import ThroughputRow  # noqa: E402
from engine.source import ModelSource  # noqa: E402

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


def log(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


@dataclass
class Report:
    """What a run found, in the order it was found; written to `out` with every row, so that a killed run has lost nothing."""

    bandwidth: float  # of a copy on this device, bytes read and written a second
    out: Path
    rows: list[ThroughputRow] = field(default_factory=list)
    held: list[dict[str, Any]] = field(default_factory=list)  # name, bar, value, holds
    notes: list[str] = field(default_factory=list)
    earlier: list[dict[str, Any]] = field(default_factory=list)  # runs to keep in front of this one

    def add(self, row: ThroughputRow) -> ThroughputRow:
        self.rows.append(row)
        share = "" if row.bandwidth_share is None else f", {row.bandwidth_share:.0%} of the limit"
        log(
            f"{row.shape} {row.weights} kv {row.kv} {row.mode} batch {row.batch}: {row.tok_per_s:,.0f} tok/s{share}"
        )
        self.save()
        return row

    def note(self, text: str) -> None:
        self.notes.append(text)
        log(text)
        self.save()

    def judge(self, name: str, value: float, bar: float, *, at_most: bool = False) -> None:
        holds = value <= bar if at_most else value >= bar
        self.held.append({"name": name, "bar": bar, "value": value, "holds": holds, "at_most": at_most})
        log(
            f"{'holds' if holds else 'MISSED'}: {name}: {value:.2f} against {'at most' if at_most else 'at least'} {bar:.2f}"
        )
        self.save()

    def save(self) -> None:
        """throughput.json and throughput.md: the runs before, then this one."""
        write_runs(self.out, [*self.earlier, document(self)])


def runs_of(folder: Path) -> list[dict[str, Any]]:
    """The runs in the throughput.json of a folder, oldest first; none where there is no such file."""
    path = folder / "throughput.json"
    return list(read_object(path)["runs"]) if path.exists() else []


def write_runs(folder: Path, runs: list[dict[str, Any]]) -> None:
    """throughput.json and throughput.md of these runs, each with its own command, commit, date and device."""
    write_json(folder / "throughput.json", {"runs": runs})
    text = "\n".join(
        ["# Throughput", "", "The latest run first.", "", *(markdown(run) for run in reversed(runs))]
    )
    atomic_write(folder / "throughput.md", text.encode())


def contender(kind: str, config: EngineConfig, shape: str = "7b") -> Contender:
    weights, kv_bits = KINDS[kind]
    return Contender(ModelSource(random_weights=shape, weights=weights), replace(config, kv_bits=kv_bits))


@contextmanager
def opened(kind: str, config: EngineConfig, report: Report, shape: str = "7b") -> Iterator[Bench]:
    began = time.monotonic()
    with open_bench(contender(kind, config, shape), report.bandwidth) as bench:
        weights = bench.weight_bytes() / GIB
        log(
            f"{shape} {kind} loaded in {time.monotonic() - began:.1f} s: {weights:.2f} GiB of weights a step, "
            f"{bench.core.blocks.total} blocks of cache"
        )
        yield bench


def document(report: Report) -> dict[str, Any]:
    return provenance(torch.cuda.get_device_name(0), triton=triton.__version__) | {
        "copy_bandwidth_tb_per_s": report.bandwidth / 1e12,
        "rows": [row.to_json() for row in report.rows],
        "must_hold": report.held,
        "notes": report.notes,
    }


def markdown(run: dict[str, Any]) -> str:
    """One run as tables for people."""
    versions = run["versions"]
    lines = [
        f"`{run['command']}`: {run['device']}, {run['date']}, commit {run['commit'][:9]}, torch {versions['torch']}, triton "
        f"{versions['triton']}; copy bandwidth {run['copy_bandwidth_tb_per_s']:.2f} TB/s (read + write). Models of random weights: "
        "speed and memory only.",
        "",
        "| shape | impl | tp | weights | KV | mode | batch | in/out | tok/s | req/s | TTFT ms p50 / p99 | ITL ms p50 / p99 | prefill tok/s | GiB | of limit | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in run["rows"]:
        cells = [
            r["shape"], r["impl"], str(r["tp"]), r["weights"], r["kv"], r["mode"], str(r["batch"]), f"{r['input_len']}/{r['output_len']}",
            f"{r['tok_per_s']:,.0f}", cell(r["req_per_s"], ".2f"),
            f"{cell(r['ttft_ms_p50'], ',.0f')} / {cell(r['ttft_ms_p99'], ',.0f')}",
            f"{cell(r['itl_ms_p50'], '.2f')} / {cell(r['itl_ms_p99'], '.2f')}", cell(r["prefill_tok_per_s"], ",.0f"),
            cell(r["memory_gib"], ".2f"), cell(r["bandwidth_share"], ".0%"), r["note"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    if run["must_hold"]:
        lines += ["", "| must hold | bar | measured | |", "| --- | --- | --- | --- |"]
    for h in run["must_hold"]:
        bar = f"{'<=' if h['at_most'] else '>='} {h['bar']:g}"
        lines.append(
            f"| {h['name']} | {bar} | {h['value']:.3g} | {'holds' if h['holds'] else '**missed**'} |"
        )
    return "\n".join([*lines, "", *(f"* {note}" for note in run["notes"]), ""])


def cell(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
