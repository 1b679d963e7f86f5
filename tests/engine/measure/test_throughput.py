"""Measurements on a tiny model on the CPU: the numbers are those of the clock, and the traces are the same everywhere."""

import itertools
import json
from dataclasses import replace

import pytest
from rich.console import Console

from convert.errors import InputError, ResourceError, UsageError
from engine.config import EngineConfig
from engine.measure.comparison import Workload, compare
from engine.measure.device_limits import covered
from engine.measure.throughput import Contender, open_bench
from engine.measure.throughput_rows import percentile
from engine.measure.trace import TraceEntry, generate_trace, read_trace, trace_text
from engine.source import ModelSource
from turbomind_quant.cli.views.throughput import rows_table

CONFIG = EngineConfig(device="cpu", max_batch=4, max_step_tokens=64, context_length=256, block_size=16)


@pytest.fixture(scope="module")
def bench():
    with open_bench(Contender(ModelSource(random_weights="tiny", weights="int4"), CONFIG), 1e10) as bench:
        yield bench


def test_static_measures_a_batch_and_leaves_nothing_behind(bench):
    row = bench.static(3, 40, 8)
    assert (row.mode, row.batch, row.input_len, row.output_len) == ("static", 3, 40, 8)
    assert (row.shape, row.weights, row.kv) == ("tiny (random)", "int4", "fp32")
    assert row.tok_per_s == pytest.approx(3e3 / row.itl_ms_p50)
    assert row.ttft_ms_p50 > 0 and row.prefill_tok_per_s > 0 and row.memory_gib > 0
    assert bench.core.blocks.free == bench.core.blocks.total and not bench.core.has_work


def test_share_of_the_limit_counts_weights_and_cache(bench):
    row = bench.static(2, 40, 8)
    # fp32 on the CPU: 2 blocks of q, k, v, o, gate, up, down; head of 1000 x 256; k and v of 2 heads of 64 in 2 layers.
    block = 256 * 256 * 2 + 2 * 128 * 256 + 3 * 512 * 256 + 2 * 256
    weights = 4 * (2 * block + 1000 * 256 + 256)
    cache = 2 * (40 + 4) * 2 * 2 * 2 * 64 * 4
    assert row.bandwidth_share == pytest.approx((weights + cache) / 1e10 / (row.itl_ms_p50 * 1e-3))


def test_random_cache_decodes_at_a_length_nobody_prefilled(bench):
    row = bench.static(2, 200, 4, random_cache=True)
    assert row.ttft_ms_p50 is None and "random" in row.note
    assert bench.core.blocks.free == bench.core.blocks.total


def test_a_batch_beyond_the_cache_is_refused_with_numbers(bench):
    with pytest.raises(ResourceError, match="256 tokens"):
        bench.static(2, 400, 4)


def test_dynamic_answers_every_request_of_the_trace(bench):
    trace = [TraceEntry(i * 0.5, 10 + i, 3 + i % 4) for i in range(12)]
    row = bench.dynamic(trace, rate=100.0)
    assert row.mode == "dynamic" and row.req_per_s > 0
    assert row.tok_per_s == pytest.approx(row.req_per_s * sum(e.output_tokens for e in trace) / 12)
    assert row.ttft_ms_p99 >= row.ttft_ms_p50 > 0 and row.itl_ms_p99 >= row.itl_ms_p50 > 0


def test_rows_are_json_and_a_table(bench):
    rows = [bench.static(1, 20, 4), bench.static(2, 20, 4)]
    assert json.loads(json.dumps([row.to_json() for row in rows]))[1]["batch"] == 2
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rows_table(rows))
    assert "tiny (random)" in console.export_text()


def test_generated_traces_depend_on_the_seed_alone():
    trace = generate_trace(500, seed=1)
    assert trace == generate_trace(500, seed=1) != generate_trace(500, seed=2)
    gaps = [b.arrival_s - a.arrival_s for a, b in itertools.pairwise(trace)]
    # Poisson with rate 1: mean gap 1 within four standard errors (4 / sqrt(500) = 0.18), variance near 1.
    assert abs(sum(gaps) / len(gaps) - 1) < 0.18
    prompts = sorted(entry.prompt_tokens for entry in trace)
    assert 120 < prompts[250] < 210 and prompts[-1] <= 2048


def test_traces_survive_a_file_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(trace_text(generate_trace(20)))
    assert read_trace(path) == generate_trace(20)
    path.write_text('{"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 5}\n{"arrival_s": 1}\n')
    with pytest.raises(InputError, match="line 2"):
        read_trace(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="no requests"):
        read_trace(path)


def test_percentiles_and_covered_time_by_hand():
    assert percentile([4, 1, 3, 2], 50) == 2 and percentile([4, 1, 3, 2], 99) == 4
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4


def test_contenders_are_compared_under_one_load_and_what_fails_is_named():
    workload = Workload(batches=(1, 2), input_len=8, output_len=4, trace=(TraceEntry(0.0, 5, 3),), rate=50.0)
    small = replace(CONFIG, cache_bytes=16 * 2 * 2 * 2 * 64 * 4)  # one block of 16 tokens
    source = ModelSource(random_weights="tiny")
    heard = []
    found = compare(
        [("small", Contender(source, small)), ("int8", Contender(source, replace(CONFIG, kv_bits=8)))],
        workload,
        lambda name, news: heard.append(name),
    )
    assert [(row.mode, row.batch, row.kv) for row in found.rows if row.kv == "int8"] == [
        ("static", 1, "int8"),
        ("static", 2, "int8"),
        ("dynamic", 4, "int8"),
    ]
    assert {name for name, _ in found.failures} == {"small"} and found.bandwidth > 0
    assert len(heard) == len(found.rows) + len(found.failures)


def test_a_trace_longer_than_the_context_is_refused(bench):
    with pytest.raises(UsageError, match="400 tokens"):
        bench.dynamic([TraceEntry(0.0, 300, 100)], rate=1.0)
