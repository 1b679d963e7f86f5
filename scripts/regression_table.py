"""Recompute the regression table on the demo model and compare it with benchmarks/regression.json; exit 1 where a row is worse.

usage: python scripts/regression_table.py MODEL             check, some minutes on two cores
       python scripts/regression_table.py MODEL --record    write the record anew: all seeds and thread counts, much longer
"""

import argparse
import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from convert.readers import open_checkpoint
from convert.tokenizer import load_tokenizer
from quant.regression import compare, compute, record_rows

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "regression.json"
CALIBRATION = ROOT / "benchmarks" / "regression" / "calibration.txt"
ARMS = ((0, 2), (0, 1), (1, 1))  # (seed, threads); the first is what the check repeats


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the demo model: scripts/demo_model.py prints its path")
    parser.add_argument("--record", action="store_true", help="write benchmarks/regression.json")
    parser.add_argument("--against", type=Path, default=RECORD, help="the record to compare with")
    options = parser.parse_args()
    ckpt = open_checkpoint(options.model)
    tokenizer = load_tokenizer(ckpt.tokenizer_dir)
    runs = []
    for seed, threads in ARMS if options.record else ARMS[:1]:
        torch.set_num_threads(threads)
        say(f"seed {seed}, {threads} threads")
        runs.append(compute(ckpt, tokenizer, CALIBRATION, seed, say))
    if options.record:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        )
        document = {
            "command": "python scripts/regression_table.py MODEL --record",
            "commit": commit.stdout.strip() or "unknown",
            "date": datetime.now(timezone.utc).date().isoformat(),
            "device": f"CPU, {platform.machine()}",
            "versions": {"python": platform.python_version(), "torch": version("torch")},
            "arms": [{"seed": seed, "threads": threads} for seed, threads in ARMS],
            "rows": record_rows(runs),
        }
        RECORD.write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")
        say(f"written: {RECORD}")
        return 0
    rows = json.loads(options.against.read_text(encoding="utf8"))["rows"]
    for row in rows:
        print(
            f"{row['row']:32} {runs[0].get(row['row'], float('nan')):10.4f}   on record {row['value']:.4f} + {row['tolerance']:.4f}"
        )
    faults = compare(runs[0], rows)
    for fault in faults:
        print(f"WORSE  {fault}")
    print("regression table: " + (f"{len(faults)} rows are worse" if faults else "every row holds"))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
