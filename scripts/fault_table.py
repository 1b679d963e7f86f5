"""Write benchmarks/faults.json, the faults that the project promises to survive, from a report of the tests: case, outcome, tests.

A test proves case 48 by an id or a name with E48 in it (letter: the group, number: the case). A case holds when all its
tests pass; a case that cannot occur here is listed with the reason.
usage: pytest --junitxml=report.xml; python scripts/fault_table.py report.xml
With --add the cases that no test of the report names keep the rows they have: for a report of some of the tests.
"""

import json
import platform
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "faults.json"
GROUPS = {  # letter -> (last case, what it is about)
    "A": (20, "checkpoint files"),
    "B": (30, "calibration data"),
    "C": (37, "disk"),
    "D": (46, "kill, interrupt, restart"),
    "E": (54, "memory and GPU"),
    "F": (65, "NaN, infinities, degenerate numbers"),
    "G": (73, "packed shards"),
    "H": (88, "HTTP server abuse"),
    "I": (100, "concurrency and lifetime"),
    "J": (116, "what a stranger's file may do"),
    "K": (132, "what users bring"),
}
NOT_APPLICABLE = {
    46: "calibration text is read in the process itself: there is no child that could be killed and waited for"
}
_CASE = re.compile(r"(?<![A-Za-z0-9])([A-K])(\d{2,3})(?![0-9])")


def cases() -> dict[int, str]:
    """Number of each case -> letter of its group."""
    letters, start = {}, 1
    for letter, (last, _) in GROUPS.items():
        letters.update(dict.fromkeys(range(start, last + 1), letter))
        start = last + 1
    return letters


def case_numbers(text: str) -> set[int]:
    """The cases that a text names; a letter that is not the group's is no reference."""
    letters = cases()
    return {int(n) for letter, n in _CASE.findall(text.replace("_", "-")) if letters.get(int(n)) == letter}


def outcomes_of(report: Path) -> dict[str, str]:
    """Name of each test that names a case -> passed, failed or skipped."""
    found = {}
    for test in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{test.get('classname', '').replace('.', '/')}.py::{test.get('name', '')}"
        states = {child.tag for child in test}
        bad = states & {"failure", "error"}
        found[name] = "failed" if bad else "skipped" if "skipped" in states else "passed"
    return {name: outcome for name, outcome in found.items() if case_numbers(name.partition("::")[2])}


def rows_of(outcomes: dict[str, str]) -> list[dict[str, object]]:
    """A row for each case, in the order of their numbers."""
    tests: dict[int, list[str]] = defaultdict(list)
    for name in outcomes:
        for number in case_numbers(name.partition("::")[2]):
            tests[number].append(name)
    rows = []
    for number, letter in cases().items():
        states = {outcomes[name] for name in tests[number]}
        status, reason = "holds", ""
        if number in NOT_APPLICABLE:
            status, reason = "not_applicable", NOT_APPLICABLE[number]
        elif not states or states == {"skipped"}:
            status, reason = "unproven", "its tests were skipped here" if states else "no test names it"
        elif "failed" in states:
            status, reason = "unproven", "a test of it fails"
        rows.append(
            {
                "case": number,
                "group": letter,
                "status": status,
                "reason": reason,
                "test": sorted(tests[number]),
            }
        )
    return rows


def main() -> int:
    names = [name for name in sys.argv[1:] if name != "--add"]
    if len(names) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    rows = rows_of(outcomes_of(Path(names[0])))
    if "--add" in sys.argv:
        old = {row["case"]: row for row in json.loads(RECORD.read_text(encoding="utf8"))["rows"]}
        rows = [row if row["test"] else old.get(row["case"], row) for row in rows]
    command = "pytest -m 'not e2e' --junitxml=report.xml; python scripts/fault_table.py report.xml"
    document = provenance(f"CPU, {platform.machine()}", command) | {
        "groups": {letter: about for letter, (_, about) in GROUPS.items()},
        "rows": rows,
    }
    RECORD.write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")
    open_cases = [
        f"{row['group']}{row['case']}: {row['reason']}" for row in rows if row["status"] == "unproven"
    ]
    print(f"{len(rows) - len(open_cases)} of {len(rows)} cases hold or cannot occur", *open_cases, sep="\n")
    return 1 if open_cases else 0


if __name__ == "__main__":
    sys.exit(main())
