"""What the functions of the library give back: frozen records with `to_json`.

The results of packing, unpacking, verifying and inspecting are defined where they are made, in `convert`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.estimate import Plan


@dataclass(frozen=True)
class QuantizeResult:
    """A finished AWQ checkpoint; the manifest in the folder holds the same, and the digest of every file.

    `layers` has one entry a linear: its layer and role, its loss after round to nearest, before and after the search, the steps that
    were kept. `standing_out` names linears whose loss is above that of round to nearest, or far above that of their role.
    """

    path: Path
    preset: str
    bits: int
    group_size: int
    bits_per_weight: float  # of a quantized weight, scales and zeros included
    size_bytes: int  # of the safetensors files
    seconds: float  # of this process; 0.0 where an earlier one had finished the work
    first_layer: int  # the layer at which this process began; above 0 where it resumed
    layers: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]
    standing_out: tuple[str, ...]
    key_factors: tuple[tuple[float, float], ...] | None = (
        None  # by layer: smallest and largest factor moved from K into Q
    )

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON data."""
        return asdict(self) | {"path": str(self.path)}


@dataclass(frozen=True)
class CalibrateResult:
    """A finished folder of statistics. `calibration`: where the text came from, its digest, its size."""

    path: Path
    num_layers: int
    calibration: dict[str, Any]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON data."""
        return asdict(self) | {"path": str(self.path)}


@dataclass(frozen=True)
class EstimateResult:
    """What a run would take. `output` is the folder that would be written, and `output_state` what is there now."""

    plan: Plan
    output: Path | None = None
    output_state: str | None = None  # "absent", "finished", "unfinished" or "foreign"

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON data, with the output folder."""
        output = None if self.output is None else str(self.output)
        return self.plan.to_json() | {"output": output, "output_state": self.output_state}
