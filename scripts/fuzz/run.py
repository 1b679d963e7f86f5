"""Fuzz the readers, guided by coverage (atheris): mutated files of strangers, which may be refused by a named error and nothing else.

Each target is a process of its own. An input that raises anything else, runs above 10 s or takes more than 2 GiB is kept in the
folder of findings, named by its target.
usage: python scripts/fuzz/run.py [--runs 20000] [--targets NAME ...] [--findings FOLDER] [--record]
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CORPUS = HERE / "corpus"
RECORD = ROOT / "benchmarks" / "fuzz.json"
LIMITS = ("-timeout=10", "-rss_limit_mb=2048", "-max_len=8192", "-print_final_stats=1", "-close_fd_mask=0")
NAMES = (
    *("safetensors", "index", "config", "checkpoint", "tokenizer_json", "tokenizer_config", "sentencepiece"),
    *(
        "tiktoken",
        "gguf",
        "yaml",
        "ini",
        "manifest",
        "run",
        "journal",
        "kv_params",
        "jsonl",
        "json_text",
        "parquet",
    ),
)


def fuzz_here(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process; never returns."""
    sys.path[:0] = [str(ROOT), str(HERE)]
    import atheris
    import torch

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=["convert", "calib_data"]):
        import targets

    def one(data: bytes) -> None:
        targets.call(name, data)

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def fuzz(name: str, runs: int, findings: Path) -> dict[str, object]:
    """Fuzz one target in a process: executions, seconds and findings. What is found lies in `findings`."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as grown:
        seeds = CORPUS / name
        command = [sys.executable, __file__, "--here", name, grown, str(seeds), f"-runs={runs}", *LIMITS]
        quiet = {**os.environ, "RUST_BACKTRACE": "0"}
        command += [f"-artifact_prefix={findings}/{name}-"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=quiet)
        for place in Path(tempfile.gettempdir()).glob("fuzz-*"):
            if place.stat().st_mtime < time.time() - 3600:
                shutil.rmtree(place, ignore_errors=True)
    stated = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    peak = re.search(r"stat::peak_rss_mb:\s*(\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    # libFuzzer also keeps the slowest inputs that ended within the limit: on a busy machine they are no finding
    found = [path.name for path in findings.glob(f"{name}-*") if "slow-unit" not in path.name]
    if done.returncode:
        (findings / f"{name}.log").write_text(done.stderr[-8000:])
    return {
        "target": name,
        "executions": int(stated[1]) if stated else 0,
        "seconds": round(time.monotonic() - begin, 1),
        "peak_mib": int(peak[1]) if peak else 0,
        "covered": int(covered[-1]) if covered else 0,
        "findings": len(found),
        "ended": done.returncode,
    }


def collected(outputs: list[Path]) -> list[dict[str, object]]:
    """A row for each target of the printed lines of earlier runs: executions, seconds and findings added, the largest of the rest."""
    rows: dict[str, dict[str, object]] = {}
    for line in (line for path in outputs for line in path.read_text().splitlines() if line.startswith("{")):
        new = json.loads(line)
        old = rows.setdefault(new["target"], dict.fromkeys(new, 0) | {"target": new["target"]})
        for key, value in new.items():
            if key != "target":
                old[key] = (
                    old[key] + value if key in ("executions", "seconds", "findings") else max(old[key], value)
                )
    return sorted(rows.values(), key=lambda row: NAMES.index(str(row["target"])))


def main() -> int:
    if sys.argv[1:2] == ["--here"]:
        fuzz_here(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=20_000, help="of each target")
    parser.add_argument("--targets", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--record", action="store_true", help="write benchmarks/fuzz.json")
    parser.add_argument(
        "--collect", nargs="*", type=Path, default=[], help="only record what earlier runs printed"
    )
    options = parser.parse_args()
    options.findings.mkdir(parents=True, exist_ok=True)
    rows = collected(options.collect)
    for name in [] if rows else options.targets:
        rows.append(fuzz(name, options.runs, options.findings))
        print(json.dumps(rows[-1]), flush=True)
    total = sum(int(str(row["executions"])) for row in rows)
    bad = [row for row in rows if row["findings"] or row["ended"]]
    print(f"{total:,} executions, {len(bad)} targets with findings (in {options.findings})")
    if options.record:
        sys.path.insert(0, str(ROOT / "scripts"))
        from provenance import provenance

        document = provenance("CPU", f"python scripts/fuzz/run.py --runs {options.runs} --record") | {
            "rows": rows
        }
        RECORD.write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
