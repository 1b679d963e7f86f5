"""The per-layer report of a quantization as a table."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.table import Table

from quant.evaluation.layer_report import Layer, is_number


def role_table(layers: Sequence[Layer]) -> Table:
    """One row a role: the loss kept as a share of RTN's, median and worst layer."""
    table = Table(box=SIMPLE_HEAD, title="loss / loss of RTN", title_justify="left")
    for name in ("linear", "median", "worst", "in layer"):
        table.add_column(name, justify="right" if name != "linear" else "left")
    shares: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for entry in layers:
        if is_number(entry["loss_after"]) and is_number(entry["loss_rtn"]) and entry["loss_rtn"] > 0:
            shares[entry["role"]].append((entry["loss_after"] / entry["loss_rtn"], entry["layer"]))
    for role, values in shares.items():
        worst, where = max(values)
        table.add_row(role, f"{median(v for v, _ in values):.3f}", f"{worst:.3f}", str(where))
    return table
