"""`throughput`: speed and memory of models under the same load."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os import fspath
from pathlib import Path
from typing import Any, get_args

import torch

from convert.errors import ResourceError, UsageError
from convert.folder.files import write_json
from engine.config import GIB, Dtype, EngineConfig, KvMode
from engine.loading import use_device
from engine.measure.comparison import Comparison, Workload
from engine.measure.comparison import compare as measure_all
from engine.measure.throughput import Contender
from engine.measure.throughput_rows import ThroughputRow
from engine.measure.trace import TraceEntry, generate_trace, read_trace
from engine.source import ModelSource
from quant.progress import Listener, Progress
from turbomind_quant.api.choices import StrPath, check_one, check_positive, chosen, counts

BATCHES = (1, 8, 32)
GENERATED_REQUESTS = 100


@dataclass(frozen=True)
class ThroughputReport:
    """What was measured, and what is needed to repeat it. `failures`: name of a model and why it could not run all of it."""

    rows: tuple[ThroughputRow, ...]
    failures: tuple[tuple[str, str], ...]
    device: str
    threads: int | None  # of a CPU
    torch_version: str
    seed: int
    trace: str | None
    requests: int
    rate: float | None  # requests a second
    memory_cap_gib: float | None
    copy_bandwidth_gb_per_s: float | None  # read and written, of a copy on the device

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return {
            "kind": "throughput",
            "device": self.device,
            "threads": self.threads,
            "versions": {"torch": self.torch_version},
            "seed": self.seed,
            "trace": self.trace,
            "requests": self.requests,
            "rate": self.rate,
            "memory_cap_gib": self.memory_cap_gib,
            "copy_bandwidth_gb_per_s": self.copy_bandwidth_gb_per_s,
            "rows": [row.to_json() for row in self.rows],
            "failures": [{"name": name, "error": error} for name, error in self.failures],
        }


def throughput(
    *paths: StrPath,
    batch: Sequence[int] | None = None,
    input_len: int = 512,
    output_len: int = 128,
    trace: StrPath | None = None,
    requests: int | None = None,
    rate: float | None = None,
    max_batch: int = EngineConfig.max_batch,
    seed: int = 0,
    kv_bits: Sequence[int] = (16,),
    kv_mode: KvMode = "dynamic",
    context_len: int | None = None,
    random_weights: StrPath | None = None,
    weights: Sequence[str] = ("fp16", "int4"),
    group_size: int = 128,
    memory_cap: float | None = None,
    tp: int = 1,
    output: StrPath | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    family: str | None = None,
    progress: Listener | None = None,
) -> ThroughputReport:
    """Speed and memory of one or more models in one run, each with every width of KV cache asked for.

    Static: prefill and decode of a fixed batch. Dynamic, where `trace`, `rate` or `requests` is given: requests that arrive by the
    clock. Prompts are random tokens. What does not fit is a failure by name, and the others go on.

    Args:
        batch: static: sequences at once; () leaves it out; None: 1, 8 and 32, or () where a dynamic option is given.
        input_len, output_len: static: tokens of a prompt, and decoded steps, of which the median counts.
        trace: JSON lines with arrival_s, prompt_tokens, output_tokens; None: a generated trace. requests: only so many of them.
        rate: requests a second (1 where None), Poisson arrivals. max_batch: sequences that run at once.
        seed: of prompts and trace. kv_bits: widths of the KV cache, 16 and 8. kv_mode: of an int8 cache, "dynamic" or "static".
        context_len: tokens a sequence may have; None: the model's.
        random_weights: also a model of random weights: "7b", "13b", "70b" or a config.json. weights: its kinds, "fp16" and "int4".
        group_size: of random int4 weights. memory_cap: GiB that are allocated on a GPU, at most. tp: GPUs to split over.
        output: also write the report to this JSON file. device, dtype, family, progress: as in `quantize`.

    Raises UsageError for choices that contradict each other or the models' context, InputError for a path that cannot be used.
    """
    load = _workload(batch, input_len, output_len, trace, requests, rate, seed)
    place = use_device(device)
    if memory_cap is not None and place.type != "cuda":
        raise UsageError(f"--memory-cap limits what is allocated on a GPU; this run is on {place}.")
    engine = _Engine(device, dtype, kv_mode, context_len, max_batch, memory_cap, tp)
    contenders = [
        (name + (", KV int8" if bits == 8 else ""), Contender(source, engine.config(load, bits)))
        for name, source in _sources(paths, family, random_weights, weights, group_size)
        for bits in chosen(kv_bits, "--kv-bits", (16, 8))
    ]
    with Progress("evaluate throughput", progress) as run:
        found = measure_all(contenders, load, partial(_tell, run))
    result = _report(found, load, place, None if trace is None else fspath(trace), memory_cap)
    if output is not None:
        write_json(Path(output), result.to_json())
    return result


def _tell(run: Progress, name: str, news: ThroughputRow | ResourceError) -> None:
    """One sentence for a row, or for what did not fit."""
    if isinstance(news, ResourceError):
        run.warn(f"{name}: {news}")
    else:
        run.say(f"{name}: {news.mode}, batch {news.batch}, {news.tok_per_s:,.1f} tokens/s")


def _report(
    found: Comparison, load: Workload, place: torch.device, trace: str | None, memory_cap: float | None
) -> ThroughputReport:
    """What was measured, with what is needed to repeat it."""
    is_gpu = place.type == "cuda"
    return ThroughputReport(
        rows=tuple(found.rows),
        failures=tuple(found.failures),
        device=torch.cuda.get_device_name(place) if is_gpu else "cpu",
        threads=None if is_gpu else torch.get_num_threads(),
        torch_version=torch.__version__,
        seed=load.seed,
        trace=trace or ("generated" if load.trace else None),
        requests=len(load.trace),
        rate=load.rate if load.trace else None,
        memory_cap_gib=memory_cap,
        copy_bandwidth_gb_per_s=None if found.bandwidth is None else found.bandwidth / 1e9,
    )


def _workload(
    batch: Sequence[int] | None,
    input_len: int,
    output_len: int,
    trace: StrPath | None,
    requests: int | None,
    rate: float | None,
    seed: int,
) -> Workload:
    """Static where there are batches, dynamic where `trace`, `rate` or `requests` is given. Raises UsageError where there is neither."""
    check_positive(input_len, "--input-len", 1)
    check_positive(output_len, "--output-len", 2)
    check_positive(requests, "--requests", 1)
    check_positive(rate, "--rate")
    is_dynamic = trace is not None or rate is not None or requests is not None
    batches = counts((() if is_dynamic else BATCHES) if batch is None else batch, "--batch")
    entries = _trace(trace, requests, seed) if is_dynamic else []
    if not batches and not entries:
        raise UsageError(
            "--batch none leaves nothing to measure: give --trace FILE, --rate or --requests too."
        )
    return Workload(batches, input_len, output_len, tuple(entries), 1.0 if rate is None else rate, seed)


def _trace(file: StrPath | None, requests: int | None, seed: int) -> list[TraceEntry]:
    """The requests of a file, or generated ones; the first `requests` of them."""
    if file is not None:
        return read_trace(Path(file))[:requests]
    return generate_trace(requests or GENERATED_REQUESTS, seed)


def _sources(
    paths: Sequence[StrPath],
    family: str | None,
    shape: StrPath | None,
    weights: Sequence[str],
    group_size: int,
) -> list[tuple[str, ModelSource]]:
    """What to load, each with a name for people. Raises UsageError where there is nothing."""
    if not paths and shape is None:
        raise UsageError(
            "nothing to measure: give a PATH, or --random-weights with 7b, 13b, 70b or a config.json."
        )
    sources = [(str(path), ModelSource(str(path), family=family)) for path in paths]
    if shape is not None:
        for kind in chosen(weights, "--weights", ("fp16", "int4")):
            random = ModelSource(random_weights=fspath(shape), weights=kind, group_size=group_size)
            sources.append((f"{shape} {kind} (random)", random))
    return sources


@dataclass(frozen=True)
class _Engine:
    """What the engines of all contenders have in common. `memory_cap` in GiB."""

    device: str
    dtype: Dtype
    kv_mode: KvMode
    context_len: int | None
    max_batch: int
    memory_cap: float | None
    tp: int

    def config(self, load: Workload, kv_bits: int) -> EngineConfig:
        """An engine that holds the largest batch of the workload. Raises UsageError for a value that is none of the choices."""
        check_one(self.kv_mode, "--kv-mode", get_args(KvMode))
        check_positive(self.memory_cap, "--memory-cap")
        batch = max([*load.batches, self.max_batch if load.trace else 1])
        try:
            return EngineConfig(
                device=self.device,
                dtype=self.dtype,
                kv_bits=8 if kv_bits == 8 else 16,
                kv_mode=self.kv_mode,
                context_length=self.context_len,
                max_batch=batch,
                max_step_tokens=max(EngineConfig.max_step_tokens, batch),
                graph_batches=tuple(sorted({*EngineConfig.graph_batches, *load.batches})),
                warm_up=bool(load.trace),
                memory_cap_bytes=None if self.memory_cap is None else int(self.memory_cap * GIB),
                tp=self.tp,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
