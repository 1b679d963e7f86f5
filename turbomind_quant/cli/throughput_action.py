"""What `evaluate throughput` does, once its flags are read: contenders and their load from flags, `engine.measure.comparison`, a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from convert.errors import ResourceError, UsageError
from convert.folder.files import write_json
from engine.config import GIB, EngineConfig
from engine.loading import use_device
from engine.measure.comparison import Comparison, Workload, compare
from engine.measure.throughput import Contender
from engine.measure.throughput_rows import ThroughputRow, row_document, rows_table
from engine.measure.trace import TraceEntry, generate_trace, read_trace
from engine.source import ModelSource
from quant.progress import Progress
from turbomind_quant.cli.outcome import Outcome
from turbomind_quant.cli.progress import ShownProgress

Flags = Mapping[str, Any]


def run_throughput(paths: Sequence[str], flags: Flags) -> Outcome:
    """Every path and random model, with every width of cache, under one load; exit code 4 where nothing could run."""
    device = use_device(flags["device"])
    workload = workload_of(flags)
    contenders = contenders_of(paths, flags, workload, device)
    with Progress("evaluate throughput", ShownProgress()) as progress:

        def tell(name: str, news: ThroughputRow | ResourceError) -> None:
            if isinstance(news, ResourceError):
                progress.warn(f"{name}: {news}")
            else:
                progress.say(f"{name}: {news.mode}, batch {news.batch}, {news.tok_per_s:,.1f} tokens/s")

        found = compare(contenders, workload, tell)
    document = document_of(found, workload, flags, device)
    if flags["output"]:
        write_json(Path(flags["output"]), document)
    return Outcome(document, [rows_table(found.rows), *_notes(found, flags)], 0 if found.rows else 4)


def workload_of(flags: Flags) -> Workload:
    """Static where --batch is not "none", dynamic where --trace, --rate or --requests is given. Raises UsageError."""
    is_dynamic = any(flags[name] is not None for name in ("trace", "rate", "requests"))
    batch = flags["batch"] if flags["batch"] is not None else ("none" if is_dynamic else "1,8,32")
    batches = () if batch.strip() == "none" else _counts(batch)
    trace: list[TraceEntry] = []
    if is_dynamic:
        count = flags["requests"]
        trace = generate_trace(count or 100, flags["seed"])
        if flags["trace"] is not None:
            trace = read_trace(Path(flags["trace"]))[:count]
    if not batches and not trace:
        raise UsageError(
            "--batch none leaves nothing to measure: give --trace FILE, --rate or --requests too."
        )
    rate = flags["rate"] if flags["rate"] is not None else 1.0
    return Workload(batches, flags["input_len"], flags["output_len"], tuple(trace), rate, flags["seed"])


def _counts(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch {text!r}: expected numbers of sequences separated by commas, or none.")
    return tuple(dict.fromkeys(int(part) for part in parts))


def contenders_of(
    paths: Sequence[str], flags: Flags, workload: Workload, device: torch.device
) -> list[tuple[str, Contender]]:
    """Sources times widths of the cache, each with a name for people. Raises UsageError."""
    shape = flags["random_weights"]
    if not paths and shape is None:
        raise UsageError(
            "nothing to measure: give a PATH, or --random-weights with 7b, 13b, 70b or a config.json."
        )
    sources = [(path, ModelSource(path, family=flags["family"])) for path in paths]
    if shape is not None:
        sources += [
            (f"{shape} {weights} (random)", ModelSource(random_weights=shape, weights=weights, group_size=flags["group_size"]))
            for weights in _names(flags["weights"], "--weights", ("fp16", "int4"))
        ]  # fmt: skip
    cap = flags["memory_cap"]
    if cap is not None and device.type != "cuda":
        raise UsageError(f"--memory-cap limits what is allocated on a GPU; this run is on {device}.")
    batch = max([*workload.batches, flags["max_batch"] if workload.trace else 1])
    out = []
    for name, source in sources:
        for bits in _names(flags["kv_bits"], "--kv-bits", ("16", "8")):
            config = EngineConfig(
                device=flags["device"],
                dtype=flags["dtype"],
                kv_bits=8 if bits == "8" else 16,
                kv_mode=flags["kv_mode"],
                context_length=flags["context_len"],
                max_batch=batch,
                max_step_tokens=max(EngineConfig.max_step_tokens, batch),
                graph_batches=tuple(sorted({*EngineConfig.graph_batches, *workload.batches})),
                warm_up=bool(workload.trace),
                memory_cap_bytes=None if cap is None else int(cap * GIB),
                tp=flags["tp"],
            )
            out.append((name + (", KV int8" if bits == "8" else ""), Contender(source, config)))
    return out


def _names(text: str, flag: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(known):
        raise UsageError(f"{flag} {text!r}: expected {' and '.join(known)}, separated by commas.")
    return list(dict.fromkeys(names))


def document_of(found: Comparison, workload: Workload, flags: Flags, device: torch.device) -> dict[str, Any]:
    """The result as JSON, with what is needed to repeat it."""
    return {
        "kind": "throughput",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": None if device.type == "cuda" else torch.get_num_threads(),
        "versions": {"torch": torch.__version__},
        "seed": workload.seed,
        "trace": flags["trace"] or ("generated" if workload.trace else None),
        "requests": len(workload.trace),
        "rate": workload.rate if workload.trace else None,
        "memory_cap_gib": flags["memory_cap"],
        "copy_bandwidth_gb_per_s": None if found.bandwidth is None else found.bandwidth / 1e9,
        "rows": [row_document(row) for row in found.rows],
        "failures": [{"name": name, "error": error} for name, error in found.failures],
    }


def _notes(found: Comparison, flags: Flags) -> list[str]:
    notes = []
    if found.bandwidth is not None:
        notes.append(
            f"A copy on this device moves {found.bandwidth / 1e9:,.0f} GB/s (read and written). The share of the limit is what a "
            "decode step reads of weights and cache at that speed, over the time it took."
        )
    if flags["random_weights"] is not None:
        notes.append("(random): weights are random numbers of that shape, for speed and memory only.")
    notes += [f"{name} could not run all of it: {error}" for name, error in found.failures]
    return notes
