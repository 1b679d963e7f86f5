"""The record of the fault table: every case once, each with tests that exist, none open."""

import json
from pathlib import Path

from scripts.fault_table import cases

ROOT = Path(__file__).resolve().parents[2]


def test_every_case_holds_or_cannot_occur_and_its_tests_exist():
    rows = json.loads((ROOT / "benchmarks" / "faults.json").read_text(encoding="utf8"))["rows"]
    assert [row["case"] for row in rows] == list(cases())
    sources: dict[str, str] = {}
    for row in rows:
        assert row["status"] in ("holds", "not_applicable")
        assert row["test"] if row["status"] == "holds" else row["reason"]
        for name in row["test"]:
            file, _, function = name.partition("::")
            if file not in sources:
                sources[file] = (ROOT / file).read_text(encoding="utf8")
            assert f"def {function.partition('[')[0]}(" in sources[file], name
