"""What `evaluate throughput` prints."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table

from engine.measure.throughput_rows import ThroughputRow
from turbomind_quant.api.speed import ThroughputReport


def throughput_view(report: ThroughputReport, is_random: bool) -> list[RenderableType]:
    """The rows as a table, then what they mean. `is_random`: some of the models have random weights."""
    parts: list[RenderableType] = [rows_table(report.rows)]
    if report.copy_bandwidth_gb_per_s is not None:
        parts.append(
            f"A copy on this device moves {report.copy_bandwidth_gb_per_s:,.0f} GB/s (read and written). The share of the limit is what a "
            "decode step reads of weights and cache at that speed, over the time it took."
        )
    if is_random:
        parts.append("(random): weights are random numbers of that shape, for speed and memory only.")
    return [*parts, *(f"{name} could not run all of it: {error}" for name, error in report.failures)]


def rows_table(rows: Sequence[ThroughputRow]) -> Table:
    """The rows for people; the first of a mode, batch and length is what the others of it are compared with."""
    table = Table(title="Throughput")
    for name in (
        "model",
        "weights",
        "KV",
        "mode",
        "batch",
        "in/out",
        "tok/s",
        "x",
        "req/s",
        "TTFT p50/p99 ms",
    ):
        table.add_column(name, justify="left" if name in ("model", "weights", "KV", "mode") else "right")
    for name in ("ITL p50/p99 ms", "prefill tok/s", "GiB", "of limit"):
        table.add_column(name, justify="right")
    first: dict[tuple[str, str, int, int], float] = {}
    for row in rows:
        key = (row.shape, row.mode, 0 if row.mode == "dynamic" else row.batch, row.input_len)
        base = first.setdefault(key, row.tok_per_s)
        table.add_row(
            row.shape if row.impl == "ours" else f"{row.shape}, {row.impl}",
            row.weights,
            row.kv,
            row.mode,
            str(row.batch),
            f"{row.input_len}/{row.output_len}",
            f"{row.tok_per_s:,.0f}",
            f"{row.tok_per_s / base:.2f}",
            _number(row.req_per_s, ".2f"),
            f"{_number(row.ttft_ms_p50, ',.0f')} / {_number(row.ttft_ms_p99, ',.0f')}",
            f"{_number(row.itl_ms_p50, '.2f')} / {_number(row.itl_ms_p99, '.2f')}",
            _number(row.prefill_tok_per_s, ",.0f"),
            _number(row.memory_gib, ".2f"),
            _number(row.bandwidth_share, ".0%"),
        )
    return table


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
