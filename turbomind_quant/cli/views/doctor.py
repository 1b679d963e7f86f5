"""What `tmq doctor` prints."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from turbomind_quant.api.doctor import Finding

MARKS = {
    "ok": "[green]ok     [/green]",
    "warning": "[yellow]warning[/yellow]",
    "problem": "[red]problem[/red]",
}


def doctor_view(findings: Sequence[Finding]) -> list[RenderableType]:
    """Two lines a finding, what was found and what to do about it; then the verdict."""
    parts: list[RenderableType] = []
    for finding in findings:
        line = f"{MARKS[finding.status]}  {escape(finding.subject):<20} {escape(finding.found)}"
        parts.append(Text.from_markup(line))
        if finding.advice:
            parts.append(Text.from_markup(f"         [dim]{escape(finding.advice)}[/dim]"))
    problems = sum(finding.status == "problem" for finding in findings)
    return [*parts, f"{problems} problems: see above." if problems else "All that is needed is there."]
