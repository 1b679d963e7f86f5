"""What `evaluate ppl`, `evaluate compare` and `evaluate table` print."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from kernels.int4 import bits_per_weight
from quant.evaluation.perplexity import Judged
from quant.evaluation.table import Row
from quant.recipes import label_of
from turbomind_quant.api.evaluation import TableReport
from turbomind_quant.api.perplexity import CompareReport, PerplexityReport


def perplexity_view(report: PerplexityReport) -> list[RenderableType]:
    """The models as a table, and how they were measured."""
    return [ppl_table(report.rows), report.protocol]


def compare_view(report: CompareReport) -> list[RenderableType]:
    """Both models as a table, the places where they disagree most, and their texts side by side."""
    parts: list[RenderableType] = [ppl_table(report.rows), report.protocol, ""]
    for number, place in enumerate(report.places, start=1):
        first, second = place.probability
        parts.append(
            f"{number}. window {place.window}, token {place.position}, KL {place.kl:.3f}: the text goes on with {place.token!r}, "
            f"likely {first:.1%} by the first model and {second:.1%} by the second, which say {place.likeliest[0]!r} and "
            f"{place.likeliest[1]!r}"
        )
        parts.append(f"   ... {' '.join(place.before.split())}")
    if report.texts:
        parts.append(texts_table(report))
    return parts


def texts_table(report: CompareReport) -> Table:
    """What either model writes after the same beginnings."""
    table = Table(box=SIMPLE_HEAD, show_lines=True)
    table.add_column("beginning", overflow="fold", ratio=1)
    for row in report.rows:
        table.add_column(row.name, overflow="fold", ratio=2)
    table.add_column("same tokens", justify="right")
    for text in report.texts:
        table.add_row(*map(escape, (text.prompt, *text.texts)), str(text.shared_tokens))
    return table


def table_view(report: TableReport) -> list[RenderableType]:
    """The methods as a table, and the texts that they were made from and judged by."""
    facts = report.calibration
    source = (
        "none" if facts is None else f"{facts['samples']} x {facts['seqlen']} tokens of {facts['source']}"
    )
    first = report.rows[0]
    return [method_table(report.rows), f"{first.windows} windows of {first.text}; calibration: {source}"]


def ppl_table(rows: Sequence[Judged]) -> Table:
    """A row a model; lower perplexity and KL are better."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    for name in ("kind", "kv", "perplexity", "to the first", "95 %", "KL", "top-1"):
        table.add_column(name, justify="left" if name in ("kind", "kv") else "right")
    for row in rows:
        result, against = row.result, row.against
        table.add_row(
            row.name,
            row.kind,
            "float" if result.kv_bits == 16 else f"int{result.kv_bits} {result.kv_mode}",
            f"{result.ppl:.3f}",
            "" if against is None else f"{against.difference:+.3f}",
            "" if against is None else f"{against.low:+.3f} .. {against.high:+.3f}",
            "" if result.kl is None else f"{result.kl:.4f}",
            "" if result.top1 is None else f"{result.top1:.1%}",
        )
    return table


def method_table(rows: Sequence[Row]) -> Table:
    """Methods down, figures across: perplexity with its distance from float, KL, top-1, seconds."""
    table = Table(box=SIMPLE_HEAD)
    for name in (
        "method",
        "bits",
        "bits/weight",
        "kv",
        "perplexity",
        "95 % above float",
        "KL",
        "top-1",
        "seconds",
    ):
        table.add_column(name, justify="left" if name in ("method", "kv") else "right")
    last = None
    for row in rows:
        if last is not None and row.bits != last:
            table.add_section()
        last = row.bits
        group = row.group_size
        table.add_row(
            label_of(row.method) + (" + distill" if row.distill else ""),
            "16" if group is None else f"{row.bits} g{group}",
            "" if group is None else f"{bits_per_weight(row.bits, group):.3f}",
            "float" if row.kv_bits == 16 else f"int{row.kv_bits} {row.kv_mode}",
            f"{row.ppl:.3f}",
            ""
            if row.ppl_diff_ci95 is None
            else f"{row.ppl_diff_ci95[0]:+.3f} .. {row.ppl_diff_ci95[1]:+.3f}",
            "" if row.kl is None else f"{row.kl:.4f}",
            "" if row.top1 is None else f"{row.top1:.1%}",
            f"{row.seconds:.0f}" if group is not None else "",
        )
    return table
