"""Runs every GPU test in a few processes at once and writes benchmarks/gpu_tests.json: one row a file of tests.

usage: python scripts/gpu_tests.py [--out benchmarks/gpu_tests.json] [--processes 12] [--limit-s 500]
A pass is clean where no test failed and each ran or says why it was skipped: the exit code is 0 then, else 1. Tests of one file share a
process, so that kernels are compiled once; the longest files start first. Names of failed tests stand in the record.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "gpu"


def run_part(part: tuple[Path, int, int], limit_s: float) -> dict[str, Any]:
    """Run one share of a file's tests. part: the file, which share, of how many."""
    path, share, shares = part
    with tempfile.TemporaryDirectory() as place:
        report, tests = Path(place) / "report.xml", collected(path)[share::shares]
        begun = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *tests,
        ]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
            code, output = done.returncode, done.stdout[-3000:] + done.stderr[-1000:]
        except subprocess.TimeoutExpired as late:
            code, output = 124, f"stopped after {limit_s:.0f} s\n{str(late.stdout or '')[-2000:]}"
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    if code:
        print(output, file=sys.stderr, flush=True)
    return {
        "file": str(path.relative_to(ROOT)),
        "collected": len(tests),
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
        "exit_code": code,
        "seconds": round(time.monotonic() - begun, 1),
        "failed_names": [case.get("name") for case in bad],
        "skip_reasons": sorted({str(case.find("skipped").get("message")) for case in skipped}),  # type: ignore[union-attr]
    }


_COLLECTED: dict[Path, list[str]] = {}


def collected(path: Path) -> list[str]:
    """Ids of the tests of a file, as pytest collects them."""
    if path not in _COLLECTED:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", str(path), "-o", "addopts="],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        _COLLECTED[path] = [line for line in done.stdout.splitlines() if "::" in line]
        assert _COLLECTED[path], f"pytest lists no test of {path}"
    return _COLLECTED[path]


def merge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a file out of the rows of its shares; seconds are those of the longest share."""
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        total = merged.setdefault(
            row["file"], {**row, "collected": 0, "passed": 0, "failed": 0, "skipped": 0}
        )
        for name in ("collected", "passed", "failed", "skipped"):
            total[name] += row[name]
        total["exit_code"] = total["exit_code"] or row["exit_code"]
        total["seconds"] = max(total["seconds"], row["seconds"])
        for name in ("failed_names", "skip_reasons"):
            total[name] = sorted({*total[name], *row[name]})
    return sorted(merged.values(), key=lambda row: str(row["file"]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu_tests.json")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument(
        "--shares", type=int, default=3, help="processes that a file of tests is dealt out to"
    )
    parser.add_argument("--limit-s", type=float, default=500, help="seconds after which a process is stopped")
    parser.add_argument("--commit", help="the commit that is tested, where the copy has no .git")
    options = parser.parse_args()
    import torch
    import triton

    if not torch.cuda.is_available():
        print("gpu_tests: no CUDA device is here; these tests need one.", file=sys.stderr)
        return 4
    begun = time.monotonic()
    files = sorted(FOLDER.glob("test_*.py"), key=lambda path: -path.stat().st_size)
    head = provenance(torch.cuda.get_device_name(), triton=triton.__version__)
    if options.commit:
        head["commit"] = options.commit
    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(collected, files))
        expected = sum(len(collected(path)) for path in files)
        parts = [(path, share, options.shares) for path in files for share in range(options.shares)]
        done: list[dict[str, Any]] = []
        for job in as_completed([pool.submit(run_part, part, options.limit_s) for part in parts]):
            done.append(job.result())
            rows = merge(done)
            totals = {name: sum(row[name] for row in rows) for name in ("passed", "failed", "skipped")}
            clean = not totals["failed"] and all(row["exit_code"] == 0 for row in rows)
            clean = clean and totals["passed"] + totals["skipped"] == expected
            document = {**head, "collected": expected, **totals, "clean": clean}
            document |= {"seconds": round(time.monotonic() - begun, 1), "rows": rows}
            # written after every part, so that a run that is cut short leaves what it found
            options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({**totals, "clean": clean, "seconds": document["seconds"]}))
    for row in rows:
        print(
            row["file"],
            row["passed"],
            "passed",
            row["failed"],
            "failed",
            row["skipped"],
            "skipped",
            row["failed_names"],
        )
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
