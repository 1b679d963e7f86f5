"""Digests of every file that the commands write: recorded before a change that must keep all bytes, compared after it.

    python scripts/record_artefacts.py -o record.json                          tiny models of every family
    python scripts/record_artefacts.py -o record.json --demo                   and the demo model
    python scripts/record_artefacts.py --demo --against record.json            what differs now; exit code 1 if anything does
    python scripts/record_artefacts.py --tree CHECKOUT --against record.json   the commands of another checkout

The commands run as a user's do, each in a process of its own, on the CPU with one thread. What is called is the entry point that
pyproject.toml of the checkout gives for the name `quantize`, `evaluate` or `tmq`, so that modules may move. All paths are relative
to one working folder (--work keeps it), and the cache is a new one, so that the text that a model writes is made again.

A record has four parts that are compared, beside `rows` (command and CPU seconds of each case):
  files      case/path -> SHA-256 of every file but those below; under `inputs` the tiny models themselves
  configs    the same of every config.json, so that an intended change of it stands by itself
  manifests  the same of every manifest.json without its versions and the digests it lists: settings, choices and losses are left
  figures    case/field -> value, of `evaluate ppl --json` and `evaluate table -o`, seconds and memory apart
Two files are left out: report.json holds seconds and memory; run.json, which is there to know an interrupted run again, holds
versions, and settings as the program's classes print them. The last bits of a sum depend on torch's version and the processor's
instructions: only records that agree in both can be equal, and a comparison says where they do not.
"""

import argparse
import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import provenance  # noqa: E402
import torch  # noqa: E402
from artefact_cases import MODELS, demo_cases, tiny_cases, write_inputs  # noqa: E402
from demo_model import fetch  # noqa: E402

CALL = (
    "import sys; from importlib.metadata import EntryPoint; name, value = sys.argv[1:3]; sys.argv[:3] = [name]; "
    "sys.exit(EntryPoint(name, value, 'console_scripts').load()())"
)
PARTS = ("files", "configs", "manifests", "figures")
MEASURED = ("seconds", "peak_gib")
UNSTABLE = ("report.json", "run.json")
OF_VERSIONS = ("digest", "files", "format", "source", "tool", "torch", "versions")  # entries of a manifest


def run(words: Sequence[str], tree: Path, work: Path) -> str:
    """Run one command in `work` and return what it printed. Exits where it fails."""
    entries = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf8"))["project"]["scripts"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONSAFEPATH": "1",
        "TMQ_CACHE": str(work / "cache"),
    }
    environment |= {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", CALL, words[0], entries[words[0]], *words[1:]]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(words)}\n{done.stdout}{done.stderr}ended with exit code {done.returncode}")
    return done.stdout


def digests(folder: Path, case: str) -> dict[str, dict[str, str]]:
    """Of the files of one folder: part of the record -> case/path -> SHA-256."""
    found: dict[str, dict[str, str]] = {part: {} for part in PARTS}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in UNSTABLE:
            part, data = "configs" if path.name == "config.json" else "files", path.read_bytes()
            if path.name == "manifest.json":
                facts = {key: value for key, value in json.loads(data).items() if key not in OF_VERSIONS}
                part, data = "manifests", json.dumps(facts, sort_keys=True).encode()
            found[part][f"{case}/{path.relative_to(folder).as_posix()}"] = hashlib.sha256(data).hexdigest()
    return found


def flat(value: Any, key: str) -> dict[str, Any]:
    """A JSON document as one level, without what is measured of the run itself."""
    if not isinstance(value, (dict, list)):
        return {key: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        k: v for name, part in parts if name not in MEASURED for k, v in flat(part, f"{key}/{name}").items()
    }


def record(cases: Sequence[tuple[str, str]], tree: Path, work: Path) -> dict[str, Any]:
    """Run the cases one after the other; the parts of the record, and a row each."""
    rows: list[dict[str, Any]] = []
    parts: dict[str, Any] = {part: {} for part in PARTS}
    for name in (*MODELS, "text.txt"):
        paths = (work / name).rglob("*") if (work / name).is_dir() else [work / name]
        for path in paths:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            parts["files"][f"inputs/{path.relative_to(work).as_posix()}"] = digest
    for case, command in cases:
        output = f"{case}.json" if command.startswith("evaluate table") else case
        tail = ["--json"] if command.startswith("evaluate ppl") else ["-o", output]
        words = [*shlex.split(command), *tail]
        before = cpu_seconds()
        printed = run(words, tree, work)
        rows.append(
            {"case": case, "command": shlex.join(words), "cpu_seconds": round(cpu_seconds() - before, 2)}
        )
        print(f"{rows[-1]['cpu_seconds']:8.1f} s  {rows[-1]['command']}", file=sys.stderr, flush=True)
        if command.startswith("evaluate"):
            text = printed if tail == ["--json"] else (work / output).read_text(encoding="utf8")
            parts["figures"] |= flat(json.loads(text), case)
        else:
            for part, found in digests(work / case, case).items():
                parts[part] |= found
    return {**parts, "rows": rows}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cases_of(document: dict[str, Any]) -> set[str]:
    return {row["case"] for row in document["rows"]}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each entry that differs or is in one record alone, of the cases that both hold."""
    cases = {"inputs", *(cases_of(old) & cases_of(new))}
    lines = []
    for part in PARTS:
        for key in sorted(old[part].keys() | new[part].keys()):
            if key.partition("/")[0] not in cases:
                continue
            if key not in old[part] or key not in new[part]:
                lines.append(f"{part}  {key}: only {'now' if key in new[part] else 'in the record'}")
            elif old[part][key] != new[part][key]:
                values = f": {old[part][key]} -> {new[part][key]}" if part == "figures" else " differs"
                lines.append(f"{part}  {key}{values}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, help="write the record to this JSON file")
    parser.add_argument("--against", type=Path, help="a record to compare with")
    parser.add_argument("--demo", action="store_true", help="the demo model too, which is downloaded once")
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout whose commands run (default: this)")
    parser.add_argument("--work", type=Path, help="keep what is written in this folder, which is new")
    options = parser.parse_args()
    old = json.loads(options.against.read_text(encoding="utf8")) if options.against else None
    provenance.ROOT = tree = options.tree.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary) / "work").resolve()
        work.mkdir(parents=True)
        write_inputs(work)
        if options.demo:
            (work / "demo.gguf").symlink_to(fetch())
        made = record([*tiny_cases(), *(demo_cases() if options.demo else ())], tree, work)
    device = f"CPU with {torch.backends.cpu.get_cpu_capability()}, one thread"
    flags = " --demo" * options.demo + " --tree CHECKOUT" * (tree != ROOT)
    command = f"python scripts/record_artefacts.py{flags} -o benchmarks/artefacts.json"
    versions = {name: version(name) for name in ("transformers", "safetensors", "gguf")}
    new = {**provenance.provenance(device, command, **versions), **made}
    if options.output:
        options.output.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n", encoding="utf8")
    if old is not None:
        lines = differences(old, new)
        for name in ("device", "versions"):
            if old[name] != new[name]:
                print(f"{name} was {old[name]}, is {new[name]}: last bits may differ for that alone.")
        alone = sorted(cases_of(old) ^ cases_of(new))
        if alone:
            print(f"not compared, in one record alone: {', '.join(alone)}")
        print("\n".join(lines) or "equal: " + ", ".join(f"{len(new[part])} {part}" for part in PARTS))
        sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
