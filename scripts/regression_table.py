"""Recompute the regression table and compare it with benchmarks/regression.json; exit 1 where a row is worse.

usage: python scripts/regression_table.py MODEL --demo DEMO.json
           check what the demo wrote, and the small model: about a minute on two cores
       python scripts/regression_table.py MODEL --record --demo A.json B.json C.json
           write the record anew, all seeds and thread counts. A, B, C: records of `scripts/demo.py` made by
           OMP_NUM_THREADS=2 --seed 0, OMP_NUM_THREADS=1 --seed 0 and OMP_NUM_THREADS=1 --seed 1
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
from provenance import provenance
from regression import DEMO, compare, compute, demo_figures, record_rows

from convert.readers import open_checkpoint
from convert.tokenizer.tokenizer import load_tokenizer

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
    parser.add_argument(
        "--demo",
        type=Path,
        nargs="+",
        default=[],
        help="what the demo wrote; left out, its rows are not looked at",
    )
    options = parser.parse_args()
    if options.record and len(options.demo) != len(ARMS):
        parser.error(f"--record takes {len(ARMS)} files of --demo, one for each arm")
    demos = [json.loads(path.read_text(encoding="utf8")) for path in options.demo]
    ckpt = open_checkpoint(options.model)
    tokenizer = load_tokenizer(ckpt.tokenizer_dir)
    runs = []
    for number, (seed, threads) in enumerate(ARMS if options.record else ARMS[:1]):
        torch.set_num_threads(threads)
        say(f"seed {seed}, {threads} threads")
        found = compute(ckpt, tokenizer, CALIBRATION, seed, say)
        if demos:
            if options.record and (demos[number]["seed"], demos[number]["threads"]) != (seed, threads):
                parser.error(f"{options.demo[number]} was made with another seed or thread count")
            found = demo_figures(demos[number]) | found
        runs.append(found)
    if options.record:
        command = "python scripts/regression_table.py MODEL --record --demo A.json B.json C.json"
        document = provenance(f"CPU, {platform.machine()}", command) | {
            "arms": [{"seed": seed, "threads": threads} for seed, threads in ARMS],
            "rows": record_rows(runs),
        }
        RECORD.write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")
        say(f"written: {RECORD}")
        return 0
    rows = json.loads(options.against.read_text(encoding="utf8"))["rows"]
    if not demos:
        rows = [row for row in rows if not row["row"].startswith(DEMO)]
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
