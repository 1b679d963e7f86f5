"""What a run keeps of a finished block as JSON: reports, warnings, ranges of K and V. Equal runs keep equal records: no times."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quant.block_task import LinearReport

HeadRanges = dict[str, tuple[Tensor, Tensor]]  # "k" and "v" -> minima and maxima (Hkv,), after RoPE


def range_record(ranges: HeadRanges) -> dict[str, list[list[float]]]:
    """Ranges as JSON; float32 values survive exactly."""
    return {name: [low.float().tolist(), high.float().tolist()] for name, (low, high) in ranges.items()}


def ranges_of(record: dict[str, list[list[float]]]) -> HeadRanges:
    """Inverse of `range_record`."""
    return {name: (torch.tensor(low), torch.tensor(high)) for name, (low, high) in record.items()}


def report_record(report: "LinearReport", index: int) -> dict[str, object]:
    """A report as JSON for the manifest; a number that is not finite becomes null."""
    record = report.to_json()
    for key, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            record[key] = None
    record["values"] = {name: value for name, value in report.values.items() if math.isfinite(value)}
    return {"layer": index, **record}


def all_ranges(records: list[dict[str, Any]]) -> list[HeadRanges] | None:
    """The ranges of every block; None where one has none."""
    found = [record["ranges"] for record in records]
    return None if None in found else [ranges_of(ranges) for ranges in found]
