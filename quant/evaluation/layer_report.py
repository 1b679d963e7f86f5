"""What stands out in the per-layer reports of a run. Numbers come from the manifest."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

FAR_ABOVE = 20.0  # times the median of the same role over all layers

Layer = Mapping[str, Any]  # one entry of the manifest's "layers"


def above_rtn(layers: Iterable[Layer]) -> list[str]:
    """Linears whose judged loss is above that of rounding to nearest, by name."""
    return [
        f"layer {entry['layer']}, {entry['role']}: loss {entry['loss_after']:.4g} is above round-to-nearest's {entry['loss_rtn']:.4g}"
        for entry in layers
        if is_number(entry["loss_after"])
        and is_number(entry["loss_rtn"])
        and entry["loss_after"] > entry["loss_rtn"]
    ]


def far_above(layers: Sequence[Layer]) -> list[str]:
    """Linears whose loss is far above that of their role in other layers, or is no number."""
    by_role: dict[str, list[float]] = defaultdict(list)
    for entry in layers:
        if is_number(entry["loss_after"]):
            by_role[entry["role"]].append(entry["loss_after"])
    found = []
    for entry in layers:
        name = f"layer {entry['layer']}, {entry['role']}"
        if not is_number(entry["loss_after"]):
            found.append(f"{name}: its loss is not a finite number")
            continue
        middle = median(by_role[entry["role"]])
        if middle > 0 and entry["loss_after"] > FAR_ABOVE * middle:
            found.append(
                f"{name}: loss {entry['loss_after']:.4g}, {entry['loss_after'] / middle:.0f} times the median of its role"
            )
    return found


def is_number(value: Any) -> bool:
    """Whether a stored loss is a number; NaN and null are not."""
    return isinstance(value, (int, float)) and value == value
