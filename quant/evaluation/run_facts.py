"""What the manifest and the report of a quantized checkpoint say, as JSON. Equal runs have equal manifests."""

from collections.abc import Sequence
from typing import Any

import torch

from kernels.int4 import bits_per_weight
from quant.config import QuantConfig
from quant.evaluation.layer_report import above_rtn, far_above
from quant.memory import gpu_peak_gib, peak_rss_gib
from quant.session import Session
from quant.state.fingerprint import device_kind, library_versions
from quant.text.sources import CalibrationSource


def manifest_facts(
    session: Session,
    quant: QuantConfig,
    source: CalibrationSource,
    records: Sequence[dict[str, Any]],
    notes: Sequence[str],
    divergence: dict[str, float] | None,
) -> dict[str, Any]:
    """The facts of the manifest.

    Args:
        records: of all blocks, as `Step.record` makes them. notes: warnings that are of no single block.
        divergence: of the end-to-end pass, None where there was none.
    """
    reports = [report for record in records for report in record["reports"]]
    factors = [record["key_factors"] for record in records]
    ckpt = session.checkpoint
    return {
        "kind": "awq",
        "bits": quant.bits,
        "group_size": quant.group_size,
        "bits_per_weight": round(bits_per_weight(quant.bits, quant.group_size), 6),
        "source": {
            "digest": ckpt.digest(),
            "family": ckpt.config.family,
            "padded_from": ckpt.config.padded_from,
        },
        "calibration": source.facts(),
        "config": quant.to_json(),
        "recipe": quant.recipe.to_json(),
        "dtype": str(session.dtype).removeprefix("torch."),
        "device": device_kind(session.device),
        "versions": library_versions(),
        "distilled": divergence,
        "key_factors": None if None in factors else factors,
        "layers": reports,
        "warnings": [
            *source.warnings,
            *(warning for record in records for warning in record["warnings"]),
            *notes,
        ],
        "standing_out": above_rtn(reports) + far_above(reports),
    }


def report_facts(seconds: float, first_layer: int, notes: Sequence[str]) -> dict[str, Any]:
    """What differs between equal runs: time, memory, where this process began, what it found damaged."""
    return {
        "seconds": round(seconds, 3),
        "resumed_at_layer": first_layer,
        "peak_rss_gib": round(peak_rss_gib(), 3),
        "gpu_peak_gib": round(gpu_peak_gib(), 3),
        "threads": torch.get_num_threads(),
        "notes": list(notes),
    }
