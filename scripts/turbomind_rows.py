"""benchmarks/turbomind.json: rows of several runs in one document, and its table. A run replaces the rows of its own checks."""

import json
import sys
from pathlib import Path
from typing import Any

from provenance import command_line, provenance

ORDER = ("names", "bytes", "emulate", "logits", "greedy", "truncated", "exporter")


def merge_rows(out: Path, rows: list[dict[str, Any]], device: str, note: str) -> None:
    """Put `rows` into out/turbomind.json in place of earlier ones with the same name, format, tp and check; write turbomind.md."""
    path = out / "turbomind.json"
    document = json.loads(path.read_text()) if path.is_file() else {"rows": [], "runs": {}}
    ours = {_key(row) for row in rows}
    kept = [row for row in document["rows"] if _key(row) not in ours]
    script = Path(sys.argv[0]).name
    runs = document["runs"] | {script: {"command": command_line(), "device": device, "note": note}}
    document = provenance(device, lmdeploy="0.6.5") | {
        "runs": runs,
        "rows": sorted(kept + rows, key=lambda row: (*_key(row)[:3], ORDER.index(row["check"]))),
    }
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    (out / "turbomind.md").write_text(table(document))


def _key(row: dict[str, Any]) -> tuple[str, str, int, str]:
    return row["name"], row["format"], row["tp"], row["check"]


def table(document: dict[str, Any]) -> str:
    """One line a workspace, one column a check."""
    lines = ["# Workspaces of ours before LMDeploy 0.6.5's engine and exporter", ""]
    for script, run in document["runs"].items():
        lines.append(f"`{script}` on {run['device']}: {run['note']}  ")
    checks = [check for check in ORDER if any(row["check"] == check for row in document["rows"])]
    lines += ["", "| name | format | tp | " + " | ".join(checks) + " |", "| --- " * (3 + len(checks)) + "|"]
    groups: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in document["rows"]:
        groups.setdefault(_key(row)[:3], {})[row["check"]] = row
    for (name, kind, tp), found in groups.items():
        cells = [_cell(found.get(check)) for check in checks]
        lines.append(f"| {name} | {kind} | {tp} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Numbers: relative (Frobenius) error of the logits; share of positions with the same argmax. -: not judged.",
    ]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    word = "ok" if row["passed"] else "FAILS"
    numbers = [] if row["rel_error"] is None else [f"{row['rel_error']:.1e}"]
    numbers += [] if row["argmax"] is None else [f"{row['argmax']:.4f}"]
    return " ".join([word, *numbers])
