"""Loads the demo model, packed in every format, in the engines that install on a CPU, and compares with our own float32 engine.

Each engine lives in an environment of its own below --work, made from the package index where it is absent; an engine that does
not install is recorded as absent with the reason. Results are kept below --work, so that a stopped run goes on; when all cases
have one, benchmarks/consumers.json and .md are written. Takes about a quarter of an hour on two cores.

    python scripts/check_consumers.py --work /tmp/consumers
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_model
import numpy as np
import torch
from consumers import by_forward, log_probabilities
from provenance import ROOT, provenance

import turbomind_quant as tmq
from convert.readers import open_checkpoint
from convert.tokenizer.tokenizer import load_tokenizer
from engine.model.attention import causal_attend
from engine.model.forward import Model

PROMPT = "The lighthouse keeper climbed the stairs every evening, and when the lamp was lit he would"
WINDOWS, LENGTH, SHORT = (
    4,
    256,
    33,
)  # tokens of a window; llama.cpp gives one token's probabilities a call, so its are short
LIMITS = {"rel_error": 2e-3, "ppl_change": 1e-3}
GPTQMODEL = ("gptqmodel", "pypcre", "tokenicer", "logbar", "device-smi", "defuser", "threadpoolctl", "dill")


@dataclass(frozen=True)
class Environment:
    """A folder with a Python of its own. `shares`: it sees the packages of this one (torch, transformers) too."""

    packages: tuple[str, ...]
    shares: bool = False
    options: tuple[str, ...] = ()


ENVIRONMENTS = {
    "own": Environment(()),
    "mlx": Environment(("mlx", "mlx-cpu", "mlx-lm", "numpy")),
    "llama": Environment(("xllamacpp", "numpy")),
    "gptq": Environment(GPTQMODEL, shares=True, options=("--no-deps", "--no-build-isolation")),
}
VERSIONS = {
    "own": ("transformers", "compressed-tensors"),
    "mlx": ("mlx", "mlx-lm"),
    "llama": ("xllamacpp",),
    "gptq": ("gptqmodel", "transformers"),
}


@dataclass(frozen=True)
class Case:
    """An engine, where it lives, and the artefact that it loads: `source` is the checkpoint, packed as `format`."""

    consumer: str
    environment: str
    source: str
    format: Any

    @property
    def folder(self) -> str:
        return self.source if self.format == "awq" else f"{self.source}-{self.format}"

    def row(self, work: Path) -> Path:
        """Where its result is kept: a run that was stopped goes on with the cases that have none."""
        return work / f"row-{self.consumer}-{self.folder}.json"


CASES = [
    *(Case("compressed_tensors", "own", source, "compressed-tensors") for source in ("g32", "g64", "s32")),
    Case("float16", "own", "g32", "float16"),
    *(Case("gptqmodel_awq", "gptq", source, "awq") for source in ("g32", "s32")),
    *(Case("gptqmodel_gptq", "gptq", source, "gptq") for source in ("g32", "s32")),
    *(Case("mlx", "mlx", source, "mlx") for source in ("g32", "g64", "s32")),
    Case("mlx", "mlx", "g32", "awq"),
    *(Case("llama_cpp", "llama", source, "gguf") for source in ("g32", "s32")),
]
SOURCES = {"g32": (32, False), "g64": (64, False), "s32": (32, True)}


def python_of(name: str, work: Path) -> tuple[Path | None, str]:
    """The Python of an environment, made where it is absent; None and the reason where it cannot be."""
    environment = ENVIRONMENTS[name]
    if not environment.packages:
        return Path(sys.executable), ""
    folder = work / f"env-{name}"
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        if environment.shares:
            site = next((folder / "lib").glob("python*/site-packages"))
            (site / "shared.pth").write_text(str(Path(np.__file__).parents[1]) + "\n")
            subprocess.run(
                [python, "-m", "pip", "install", "-q", "-U", "setuptools>=77", "wheel"], check=True
            )
        command = [str(python), "-m", "pip", "install", "-q", *environment.options, *environment.packages]
        done = subprocess.run(command, capture_output=True, text=True, env=_environ())
        if done.returncode:
            return None, "does not install: " + (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        (folder / "ready").touch()
    return python, ""


def _environ() -> dict[str, str]:
    import os

    return {**os.environ, "BUILD_CUDA_EXT": "0", "PYTHONPATH": ""}


def versions_of(name: str, python: Path) -> dict[str, str]:
    """Versions of the engine's packages, asked of its own Python."""
    text = f"import importlib.metadata as m; print(*(m.version(p) for p in {VERSIONS[name]!r}))"
    done = subprocess.run([python, "-c", text], capture_output=True, text=True, check=True, env=_environ())
    return dict(zip(VERSIONS[name], done.stdout.split(), strict=True))


def prepare(model: Path, work: Path) -> None:
    """The checkpoints, and every artefact that a case needs; what is finished stays."""
    for name, (group, symmetric) in SOURCES.items():
        if not (work / name / "tmq/manifest.json").is_file():
            tmq.quantize(model, work / name, preset="rtn", group_size=group, symmetric=symmetric)
    for case in CASES:
        if case.format != "awq" and not (work / case.folder / "tmq/manifest.json").is_file():
            tmq.pack(work / case.source, work / case.folder, format=case.format)


def task_of(work: Path, length: int) -> dict[str, Any]:
    """The prompt and the windows of text, as ids."""
    tokenizer = load_tokenizer(work / "g32")
    text = "\n\n".join(path.read_text() for path in sorted((ROOT / "calib_data/texts").glob("*.txt")))
    ids = tokenizer.encode(text)
    step = len(ids) // WINDOWS
    windows = [ids[step * i : step * i + length] for i in range(WINDOWS)]
    vocab = open_checkpoint(work / "g32").config.vocab_size
    return {"prompt": tokenizer.encode(PROMPT), "greedy": 32, "windows": windows, "vocab_size": vocab}


def reference(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """What our own engine computes with the dequantized weights in float32."""
    model = Model.from_checkpoint(open_checkpoint(folder), torch.device("cpu"), torch.float32)

    def forward(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            tokens = torch.tensor(ids)
            hidden = model(tokens, torch.arange(len(ids)), causal_attend(1, len(ids), model.config))
        result: np.ndarray = torch.as_tensor(hidden).float().numpy()
        return result

    return by_forward(forward, task)


def compare(found: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Distances of one engine's results from ours."""
    ours, theirs = wanted["logits"], found["logits"]
    if len(theirs) == 1:  # log-probabilities of the next token alone
        ours, theirs = log_probabilities(ours[-1:]), log_probabilities(theirs)
    error = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
    change = float(np.exp(np.mean(found["nll"]) - np.mean(wanted["nll"])) - 1)
    same = [a == b for a, b in zip(found["greedy"].tolist(), wanted["greedy"], strict=True)]
    equal = same.index(False) if False in same else len(same)
    return {
        "rel_error": error,
        "greedy_equal": equal,
        "ppl": float(np.exp(np.mean(found["nll"]))),
        "ppl_change": change,
        "passed": error <= LIMITS["rel_error"] and equal == 32 and abs(change) <= LIMITS["ppl_change"],
    }


def run_case(case: Case, work: Path, tasks: dict[int, Path]) -> dict[str, Any]:
    """One row: what the engine computed, or why it could not."""
    row: dict[str, Any] = {"consumer": case.consumer, "format": case.format, "checkpoint": case.source}
    python, reason = python_of(case.environment, work)
    if python is None:
        return row | {"passed": None, "reason": reason}
    length = SHORT if case.consumer == "llama_cpp" else LENGTH
    out = work / "found.npz"
    command = [python, ROOT / "scripts/consumers.py", case.consumer, work / case.folder, tasks[length], out]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=_environ())
    row["versions"] = versions_of(case.environment, python)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return row | {"passed": None, "reason": (lines or ["no message"])[-1][:200]}
    task = json.loads(tasks[length].read_text())
    return row | compare(np.load(out), reference(work / case.source, task))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "# Real consumers of every format",
        "",
        "The demo model, rounded to nearest, against our engine's float32 logits with the same weights. g32, g64: groups; s32: groups of",
        f"32, symmetric. Bounds: relative error of logits {LIMITS['rel_error']:g}, 32 greedy tokens equal, perplexity of {WINDOWS} windows within "
        f"{LIMITS['ppl_change']:.1%}.",
        "",
        "| engine | format | checkpoint | rel. error of logits | greedy tokens equal | perplexity | change | within bounds | versions |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        head = f"| {row['consumer']} | {row['format']} | {row['checkpoint']} |"
        named = ", ".join(f"{name} {version}" for name, version in row.get("versions", {}).items())
        if row["passed"] is None:
            lines.append(f"{head} | | | | did not run: {row['reason']} | {named} |")
            continue
        told = "yes" if row["passed"] else "no"
        lines.append(
            f"{head} {row['rel_error']:.1e} | {row['greedy_equal']} of 32 | {row['ppl']:.4f} | {row['ppl_change']:+.4%} | {told} | {named} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cases, or those whose engine is named, and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="Folder for environments and artefacts.")
    parser.add_argument("--only", nargs="*", help="Names of engines to run now.")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(demo_model.fetch(), args.work)
    tasks = {}
    for length in (LENGTH, SHORT):
        tasks[length] = args.work / f"task-{length}.json"
        tasks[length].write_text(json.dumps(task_of(args.work, length)))
    for case in CASES:
        if (args.only is None or case.consumer in args.only) and not case.row(args.work).is_file():
            row = run_case(case, args.work, tasks)
            print(json.dumps(row), flush=True)
            case.row(args.work).write_text(json.dumps(row))
    if not all(case.row(args.work).is_file() for case in CASES):
        return
    rows = [json.loads(case.row(args.work).read_text()) for case in CASES]
    document = provenance("cpu") | {"rows": rows}
    (ROOT / "benchmarks/consumers.json").write_text(json.dumps(document, indent=1) + "\n")
    (ROOT / "benchmarks/consumers.md").write_text(table(rows))


if __name__ == "__main__":
    main()
