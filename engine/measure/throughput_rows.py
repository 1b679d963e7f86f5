"""Rows of throughput: one flat record a measurement."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


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

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON data."""
        return asdict(self)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(percent) // 100) - 1)]
