"""Views of the per-layer reports: what stands out, and the table that a user reads. Numbers come from the manifest."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

FAR_ABOVE = 20.0  # times the median of the same role over all layers

Layer = Mapping[str, Any]  # one entry of the manifest's "layers"


def above_rtn(layers: Iterable[Layer]) -> list[str]:
    """Linears whose judged loss is above that of rounding to nearest, by name."""
    return [
        f"layer {entry['layer']}, {entry['role']}: loss {entry['loss_after']:.4g} is above round-to-nearest's {entry['loss_rtn']:.4g}"
        for entry in layers
        if _is_number(entry["loss_after"])
        and _is_number(entry["loss_rtn"])
        and entry["loss_after"] > entry["loss_rtn"]
    ]


def far_above(layers: Sequence[Layer]) -> list[str]:
    """Linears whose loss is far above that of their role in other layers, or is no number."""
    by_role: dict[str, list[float]] = defaultdict(list)
    for entry in layers:
        if _is_number(entry["loss_after"]):
            by_role[entry["role"]].append(entry["loss_after"])
    found = []
    for entry in layers:
        name = f"layer {entry['layer']}, {entry['role']}"
        if not _is_number(entry["loss_after"]):
            found.append(f"{name}: its loss is not a finite number")
            continue
        middle = median(by_role[entry["role"]])
        if middle > 0 and entry["loss_after"] > FAR_ABOVE * middle:
            found.append(
                f"{name}: loss {entry['loss_after']:.4g}, {entry['loss_after'] / middle:.0f} times the median of its role"
            )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value


def layer_table(layers: Sequence[Layer]) -> Table:
    """One row a layer: loss of all its linears, RTN's and ours, and the steps that were kept."""
    table = Table(
        box=SIMPLE_HEAD, title="loss by layer (tr(dW G dW^T) summed over its linears)", title_justify="left"
    )
    for name in ("layer", "rtn", "kept", "change", "steps"):
        table.add_column(name, justify="right" if name != "steps" else "left")
    by_layer: dict[int, list[Layer]] = defaultdict(list)
    for entry in layers:
        by_layer[entry["layer"]].append(entry)
    for index, entries in sorted(by_layer.items()):
        rtn = sum(e["loss_rtn"] for e in entries if _is_number(e["loss_rtn"]))
        after = sum(e["loss_after"] for e in entries if _is_number(e["loss_after"]))
        steps = sorted({step for e in entries for step in e["steps"]})
        change = f"{after / rtn - 1:+.1%}" if rtn > 0 else "-"
        table.add_row(str(index), f"{rtn:.4g}", f"{after:.4g}", change, ", ".join(steps) or "-")
    return table


def role_table(layers: Sequence[Layer]) -> Table:
    """One row a role: the loss kept as a share of RTN's, median and worst layer."""
    table = Table(box=SIMPLE_HEAD, title="loss / loss of RTN", title_justify="left")
    for name in ("linear", "median", "worst", "in layer"):
        table.add_column(name, justify="right" if name != "linear" else "left")
    shares: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for entry in layers:
        if _is_number(entry["loss_after"]) and _is_number(entry["loss_rtn"]) and entry["loss_rtn"] > 0:
            shares[entry["role"]].append((entry["loss_after"] / entry["loss_rtn"], entry["layer"]))
    for role, values in shares.items():
        worst, where = max(values)
        table.add_row(role, f"{median(v for v, _ in values):.3f}", f"{worst:.3f}", str(where))
    return table
