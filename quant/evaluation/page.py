"""`evaluate report`: results as one self-contained HTML page, tables and plots inside. Needs the extra `report`.

Reads the JSON of `evaluate table|ppl|throughput`, files of benchmarks/, and the manifests of quantized folders.
"""

import base64
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import InputError, UsageError
from convert.folder.files import atomic_write
from convert.folder.output import FolderState, folder_state, read_manifest

Row = Mapping[str, Any]
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Section:
    """One part of the page: a table of cells, and a plot as base64 PNG where there is something to plot."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]
    plot: str | None


def write_page(runs: Sequence[str], out: Path) -> Path:
    """Write the page for these results. Raises UsageError without the extra, InputError for a run that is no result."""
    try:
        import jinja2
        import matplotlib
    except ImportError as error:
        raise UsageError(
            f"evaluate report needs {error.name}, which is not installed: pip install 'turbomind-quant[report]'."
        ) from error
    matplotlib.use("Agg")
    sections = [read_run(Path(run)) for run in runs]
    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text("utf-8"))
    page = template.render(sections=sections)
    atomic_write(out, page.encode())
    return out


def read_run(path: Path) -> Section:
    """One result as a section of the page."""
    if path.is_dir():
        return manifest_section(path)
    expected = "give what `evaluate ... --json` or `-o FILE` wrote, or a quantized folder"
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: {expected}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {expected}.") from error
    rows = document.get("rows") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} holds no rows: {expected}.")
    if "tok_per_s" in rows[0]:
        return throughput_section(path.name, rows)
    if "ppl" in rows[0]:
        return perplexity_section(path.name, document, rows)
    return plain_section(path.name, rows)


def perplexity_section(name: str, document: Mapping[str, Any], rows: list[Row]) -> Section:
    """Perplexity by method and width, or by path."""
    columns = [
        "model",
        "method" if "method" in rows[0] else "format",
        "bits",
        "group",
        "KV",
        "perplexity",
        "above the first",
        "KL",
        "top-1",
        "seconds",
    ]
    cells = [
        [
            str(row.get("path", row.get("model", ""))),
            str(row.get("method", row.get("kind", ""))),
            _text(row.get("bits")),
            _text(row.get("group_size")),
            "float" if row.get("kv_bits", 16) == 16 else f"int{row['kv_bits']} {row.get('kv_mode') or ''}",
            _number(row.get("ppl"), ".3f"),
            _number(_above(row, rows[0]), "+.3f"),
            _number(row.get("kl"), ".4f"),
            _number(row.get("top1"), ".1%"),
            _number(row.get("seconds"), ".1f"),
        ]
        for row in rows
    ]
    labels = [_label(row) for row in rows]
    plot = bars(labels, [float(row["ppl"]) for row in rows], "perplexity (lower is better)")
    first = rows[0]
    note = str(document.get("protocol") or f"{first.get('windows', '?')} windows of {first.get('text', '?')}")
    kept = [
        k for k in range(len(columns)) if any(line[k] for line in cells)
    ]  # paths have no bits of their own
    return Section(
        f"Perplexity: {name}",
        note,
        [columns[k] for k in kept],
        [[line[k] for k in kept] for line in cells],
        plot,
    )


def throughput_section(name: str, rows: list[Row]) -> Section:
    """Speed by batch."""
    columns = [
        "model",
        "weights",
        "KV",
        "mode",
        "batch",
        "in / out",
        "tokens/s",
        "latency ms",
        "share of the limit",
        "GiB",
    ]
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    cells = []
    for row in rows:
        lines[f"{row['impl']} {row['weights']}, KV {row['kv']}"].append(
            (float(row["batch"]), float(row["tok_per_s"]))
        )
        cells.append(
            [
                str(row["shape"]),
                str(row["weights"]),
                f"{row['kv']} {row.get('kv_mode') or ''}",
                str(row["mode"]),
                str(row["batch"]),
                f"{row['input_len']} / {row['output_len']}",
                _number(row["tok_per_s"], ",.1f"),
                _number(row.get("itl_ms_p50"), ".2f"),
                _number(row.get("bandwidth_share"), ".0%"),
                _number(row.get("memory_gib"), ".2f"),
            ]
        )
    plot = curves(lines, "sequences at once", "tokens a second")
    return Section(
        f"Throughput: {name}",
        "decode with a full batch; the limit is the measured copy bandwidth",
        columns,
        cells,
        plot,
    )


def manifest_section(path: Path) -> Section:
    """The per-layer report of a quantized folder."""
    if folder_state(path) is not FolderState.FINISHED:
        raise InputError(f"{path} holds no finished result of ours: its manifest is missing.")
    data = read_manifest(path).data
    layers = data.get("layers")
    if not isinstance(layers, list) or not layers:
        raise InputError(f"{path} has no per-layer report: give a folder that `quantize awq` wrote.")
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for entry in layers:
        for place, key in enumerate(("loss_rtn", "loss_after")):
            sums[entry["layer"]][place] += entry[key] or 0.0
    cells = [
        [str(index), f"{rtn:.4g}", f"{after:.4g}", f"{after / rtn:.3f}" if rtn > 0 else ""]
        for index, (rtn, after) in sorted(sums.items())
    ]
    points = {
        "round to nearest": [(float(i), v[0]) for i, v in sorted(sums.items())],
        "kept": [(float(i), v[1]) for i, v in sorted(sums.items())],
    }
    config = data.get("config", {})
    note = f"preset {config.get('preset')}, int{config.get('bits')} groups of {config.get('group_size')}; loss tr(dW G dW^T) of a layer's linears"
    remarks = [*data.get("warnings", []), *data.get("standing_out", [])]
    if remarks:
        note += f"; {len(remarks)} remarks, the first: {remarks[0]}"
    plot = curves(points, "layer", "loss", is_log=True)
    return Section(
        f"Quantization: {path.name}", note, ["layer", "round to nearest", "kept", "share"], cells, plot
    )


def plain_section(name: str, rows: list[Row]) -> Section:
    """Any other flat rows, as they are."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Section(name, "", columns, [[_text(row.get(key)) for key in columns] for row in rows], None)


def bars(labels: Sequence[str], values: Sequence[float], axis: str) -> str:
    """A bar chart as base64 PNG. Values are drawn up to four times the smallest, so that one broken row hides nothing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 + 0.32 * len(values)), layout="constrained")
    axes = figure.subplots()
    limit = 4 * min(values)
    axes.barh(range(len(values)), [min(value, limit) for value in values], color="#3b6ea5")
    axes.set_yticks(range(len(values)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    for place, value in enumerate(values):
        axes.text(min(value, limit), place, f" {value:.2f}", va="center")
    axes.margins(x=0.12)
    return _png(figure)


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, is_log: bool = False) -> str:
    """A line for each name, as base64 PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", markersize=3, label=name)
    if is_log and all(p[1] > 0 for points in lines.values() for p in points):
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


def _label(row: Row) -> str:
    if "method" not in row:
        return str(row.get("path", ""))
    kv = "" if row.get("kv_bits", 16) == 16 else f", KV int{row['kv_bits']}"
    return f"{row['method']}{'' if row.get('group_size') is None else ' int' + str(row['bits'])}{kv}"


def _above(row: Row, first: Row) -> float | None:
    return None if row is first or row.get("ppl") is None else float(row["ppl"]) - float(first["ppl"])


def _number(value: Any, style: str) -> str:
    return "" if value is None else format(float(value), style)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
