"""Several models, or one with several caches, under the same load in one run. Measures with `engine.measure.throughput`; prints nothing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from convert.errors import ResourceError, UsageError
from engine.loading import context_limit, open_source
from engine.measure.throughput import Bench, Contender, open_bench, spare_tokens
from engine.measure.throughput_rows import ThroughputRow
from engine.measure.trace import TraceEntry

WARMING_REQUESTS = 40  # of the trace, sent at once before a GPU is measured: they compile and capture
WARMING_RATE = 1000.0


@dataclass(frozen=True)
class Workload:
    """What every contender does: decode at each of `batches`, then answer the `trace`. Either may be empty."""

    batches: tuple[int, ...] = ()
    input_len: int = 512
    output_len: int = 128
    trace: tuple[TraceEntry, ...] = ()
    rate: float = 1.0  # requests a second
    seed: int = 0  # of the prompts


@dataclass
class Comparison:
    """What was found, in order. `failures`: name of a contender and why it could not run all of it, with numbers."""

    rows: list[ThroughputRow] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    bandwidth: float | None = None  # bytes a second, read and written, of a copy on the device


def measure(
    bench: Bench, workload: Workload, fail: Callable[[ResourceError], None]
) -> Iterator[ThroughputRow]:
    """Row by row; a batch that does not fit is told to `fail`, and the next is tried."""
    for batch in workload.batches:
        try:
            bench.settle(batch, workload.input_len)
            yield bench.static(batch, workload.input_len, workload.output_len)
        except ResourceError as error:
            fail(error)
    if workload.trace:
        if bench.device.type == "cuda":
            bench.dynamic(workload.trace[:WARMING_REQUESTS], WARMING_RATE)
        yield bench.dynamic(workload.trace, workload.rate)


def refuse_too_long(contenders: Sequence[tuple[str, Contender]], workload: Workload) -> None:
    """Raises UsageError where the context of a contender holds no batch of the workload: nothing could be measured."""
    for name, contender in contenders if workload.batches else ():
        config = contender.config
        limit = context_limit(open_source(contender.source, config).config, config.context_length)
        prompt = min(workload.batches) * workload.input_len
        spare = spare_tokens(prompt, config.max_step_tokens)
        if workload.input_len + workload.output_len + spare > limit:
            raise UsageError(
                f"--input-len {workload.input_len} and --output-len {workload.output_len} (and {spare} more that the measurement needs) "
                f"are above the context of {name}, {limit} tokens: ask for fewer."
            )


def compare(
    contenders: Sequence[tuple[str, Contender]],
    workload: Workload,
    tell: Callable[[str, ThroughputRow | ResourceError], None] = lambda name, news: None,
) -> Comparison:
    """Each contender, by name, alone on the device; `tell` hears of every row and every failure as it comes.

    Raises UsageError, before anything is loaded, for sequences that are longer than a context.
    """
    refuse_too_long(contenders, workload)
    found = Comparison()
    for name, contender in contenders:

        def fail(error: ResourceError, name: str = name) -> None:
            found.failures.append((name, str(error)))
            tell(name, error)

        try:
            with open_bench(contender, found.bandwidth, workload.seed) as bench:
                found.bandwidth = bench.bandwidth
                for row in measure(bench, workload, fail):
                    found.rows.append(row)
                    tell(name, row)
        except ResourceError as error:
            fail(error)
    return found
