"""Rows of throughput: one flat record a measurement, the same in JSON and in the table for people."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table


@dataclass(frozen=True)
class ThroughputRow:
    """One measurement. Times in ms, memory in GiB; None where a mode has no such figure."""

    impl: str
    shape: str
    tp: int
    mode: Literal["static", "dynamic"]
    weights: str
    kv: str
    kv_mode: str
    batch: int
    input_len: int
    output_len: int
    tok_per_s: float
    req_per_s: float | None = None
    ttft_ms_p50: float | None = None
    ttft_ms_p99: float | None = None
    itl_ms_p50: float | None = None
    itl_ms_p99: float | None = None
    memory_gib: float | None = None
    bandwidth_share: float | None = None
    prefill_tok_per_s: float | None = None
    busy_share: float | None = None
    preemptions: int | None = None
    note: str = ""


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(percent) // 100) - 1)]


def row_document(row: ThroughputRow) -> dict[str, Any]:
    """The row as plain JSON data."""
    return asdict(row)


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
