"""How fast an engine is: static (a fixed batch) and dynamic (a trace of requests). Measures an `EngineCore`; prints nothing.

Static: B prompts at once; prefill is the time until the last first token, decode the median time of a step in which all B sequences draw
a token. Dynamic: requests arrive by the clock; time to first token counts from the arrival, inter-token latency between the tokens
of one request. The share of the bandwidth limit is (bytes of weights and of cached keys and values that a decode step reads) / (measured
copy bandwidth) / (time of the step).
"""

import gc
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from convert.errors import ResourceError, UsageError
from engine.api import Request, SamplingParams
from engine.config import EngineConfig
from engine.loading import make_runner, open_source, resolve_device
from engine.measure.device_limits import busy_share, copy_bandwidth, peak_gib, reset_peak
from engine.measure.throughput_rows import ThroughputRow, percentile
from engine.measure.trace import TraceEntry
from engine.measure.trace_run import TraceRun, raise_errors
from engine.process.ranks import start_group
from engine.serving.cache import block_bytes
from engine.serving.core import EngineCore
from engine.serving.runner import ModelRunner
from engine.source import ModelSource

SETTLING_STEPS = 4  # decode steps before the first that counts
PROFILED_STEPS = 60


@dataclass(frozen=True)
class Contender:
    """A model and how it is run, with the names its rows bear."""

    source: ModelSource
    config: EngineConfig
    impl: str = "ours"


@dataclass
class Bench:
    """A loaded contender, ready to be measured, and the measured limit of its device. `runner` is that of rank 0."""

    core: EngineCore
    runner: ModelRunner
    contender: Contender
    shape: str
    weights: str
    bandwidth: float  # bytes per second
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def device(self) -> torch.device:
        return self.runner.device

    def weight_bytes(self) -> int:
        """Bytes of weights that one decode step reads: all blocks, the final norm and the head, not the embedding."""
        model = self.runner.model
        return (
            sum(block.size_bytes for block in model.blocks) + model.lm_head.nbytes + model.final_norm.nbytes
        )

    def step_bytes(self, batch: int, context: float) -> float:
        """Bytes that a decode step of `batch` sequences of `context` tokens reads."""
        runner = self.runner
        per_token = block_bytes(runner.model.config, runner.config, runner.model.dtype) / runner.block_size
        return self.weight_bytes() + batch * context * per_token

    def settle(self, batch: int, input_len: int) -> None:
        """On a GPU, run once what `static` will run, so that kernels are compiled and the step is captured."""
        if self.device.type == "cuda":
            self.static(batch, input_len, 2)

    def static(
        self, batch: int, input_len: int, output_len: int = 128, *, random_cache: bool = False
    ) -> ThroughputRow:
        """B sequences at once. `random_cache`: the prompt's keys and values are random bits, nothing is prefilled.

        Raises ResourceError where the batch does not fit into the cache.
        """
        spare = spare_tokens(0 if random_cache else batch * input_len, self.core.config.max_step_tokens)
        self._check_room(batch, input_len + output_len + spare)
        if random_cache:
            self.runner.cache.fill_random()
        reset_peak(self.device)
        self._start(batch, input_len, output_len + spare, random_cache)
        began, prefill_s, steps = time.perf_counter(), 0.0, list[float]()
        started: set[str] = set()
        last = began
        while len(steps) < output_len + SETTLING_STEPS:
            raise_errors(events := self.core.step())
            now = time.perf_counter()
            if len(started) == batch:
                steps.append(now - last)
            started.update(event.request_id for event in events if event.token_ids)
            if len(started) == batch and not prefill_s:
                prefill_s = now - began
            last = now
        self._drain()
        itl = [1e3 * s for s in steps[SETTLING_STEPS:]]
        step_s = percentile(itl, 50) / 1e3
        moved = self.step_bytes(batch, input_len + output_len / 2)
        row = self._row("static", batch, input_len, output_len, batch / step_s)
        return replace(
            row,
            itl_ms_p50=percentile(itl, 50),
            itl_ms_p99=percentile(itl, 99),
            ttft_ms_p50=None if random_cache else 1e3 * prefill_s,
            prefill_tok_per_s=None if random_cache else batch * input_len / prefill_s,
            bandwidth_share=moved / self.bandwidth / step_s,
            note="cache filled with random values" if random_cache else "",
        )

    def dynamic(self, trace: Sequence[TraceEntry], rate: float, *, profile: bool = False) -> ThroughputRow:
        """The trace at `rate` requests a second. `profile` adds the GPU's busy share over the middle of the run.

        Raises UsageError for a request that is longer than the context.
        """
        longest = max(entry.prompt_tokens + entry.output_tokens for entry in trace)
        if longest > self.core.context_length:
            raise UsageError(
                f"The trace has a request of {longest} tokens; a sequence may have {self.core.context_length} here: "
                "give the cache more memory, or take another trace."
            )
        clock = TraceRun(self.core, trace, rate, self._prompt)
        reset_peak(self.device)
        busy = None
        if profile and self.device.type == "cuda":
            clock.run(until=len(trace) // 3)
            busy = busy_share(lambda: clock.run(steps=PROFILED_STEPS))
        clock.run()
        ttft, itl = [1e3 * s for s in clock.first_token_s], [1e3 * s for s in clock.gaps_s]
        tokens = sum(entry.output_tokens for entry in trace)
        row = self._row(
            "dynamic",
            self.core.config.max_batch,
            round(statistics.mean(entry.prompt_tokens for entry in trace)),
            round(tokens / len(trace)),
            tokens / clock.elapsed_s,
        )
        return replace(
            row,
            req_per_s=len(trace) / clock.elapsed_s,
            ttft_ms_p50=percentile(ttft, 50),
            ttft_ms_p99=percentile(ttft, 99),
            itl_ms_p50=percentile(itl, 50),
            itl_ms_p99=percentile(itl, 99),
            busy_share=busy,
            preemptions=self.core.scheduler.preemptions,
            note=f"{len(trace)} requests at {rate:g} a second",
        )

    def _row(
        self,
        mode: Literal["static", "dynamic"],
        batch: int,
        input_len: int,
        output_len: int,
        tok_per_s: float,
    ) -> ThroughputRow:
        config = self.contender.config
        dtype = str(self.runner.model.dtype).removeprefix("torch.")
        names = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
        return ThroughputRow(
            impl=self.contender.impl,
            shape=self.shape,
            tp=config.tp,
            mode=mode,
            weights=self.weights,
            kv="int8" if config.kv_bits == 8 else names[dtype],
            kv_mode=config.kv_mode if config.kv_bits == 8 else "",
            batch=batch,
            input_len=input_len,
            output_len=output_len,
            tok_per_s=tok_per_s,
            memory_gib=peak_gib(self.device),
        )

    def _check_room(self, batch: int, tokens: int) -> None:
        blocks = self.core.blocks
        needed = batch * blocks.blocks_for(tokens)
        if batch > self.core.config.max_batch:
            raise UsageError(f"batch {batch} is above max_batch {self.core.config.max_batch} of this engine.")
        if needed > blocks.total or tokens > self.core.context_length:
            raise ResourceError(
                f"{batch} sequences of {tokens} tokens need {needed} blocks of {blocks.block_size} tokens; the cache has "
                f"{blocks.total}, and a sequence may have {self.core.context_length} tokens."
            )

    def _prompt(self, tokens: int) -> tuple[int, ...]:
        return tuple(self.rng.choices(range(self.core.runner.vocab_size), k=tokens))

    def _start(self, batch: int, input_len: int, output_len: int, random_cache: bool) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        for i in range(batch):
            self.core.add(Request(f"static-{i}", self._prompt(input_len), sampling))
            if random_cache:
                self.core.scheduler.waiting[-1].computed = input_len - 1

    def _drain(self) -> None:
        for i in range(self.core.config.max_batch):
            self.core.abort(f"static-{i}")
        while self.core.has_work:
            self.core.step()


def spare_tokens(prompt_tokens: int, max_step_tokens: int) -> int:
    """Tokens above the asked ones that a static sequence draws: while decoding settles, and while the others are prefilled."""
    return SETTLING_STEPS + -(-prompt_tokens // max_step_tokens) + 2


@contextmanager
def open_bench(contender: Contender, bandwidth: float | None = None, seed: int = 0) -> Iterator[Bench]:
    """Load a contender; its memory is free again behind the block. `bandwidth` spares measuring it again; `seed` draws prompts."""
    device = resolve_device(contender.config.device)
    bandwidth = bandwidth or copy_bandwidth(device)
    ckpt = open_source(contender.source, contender.config)
    try:
        if contender.config.tp == 1:
            runner = make_runner(ckpt, contender.config)
            core = EngineCore(runner, contender.config)
        else:
            group = start_group(contender.source, contender.config)
            runner, core = group.local, EngineCore(group, contender.config)
    except ResourceError:
        free_device(device)
        raise
    fmt, floats = ckpt.config.quantization, {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    weights = f"int{fmt.bits}" if fmt is not None else floats[ckpt.config.dtype]
    name = contender.source.random_weights
    shape = ckpt.path.name if name is None else f"{Path(name).stem} (random)"
    try:
        yield Bench(core, runner, contender, shape, weights, bandwidth, random.Random(seed))
    finally:
        core.close()
        free_device(device)


def free_device(device: torch.device) -> None:
    """Give back what nobody holds any more, and lift the limit that a contender had."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)
