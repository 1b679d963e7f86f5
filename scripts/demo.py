"""The main job on a real model, step by step, as a user would type it; records each step's time and memory.

Less text than the full protocol, so that it ends in minutes on two cores: 32 x 256 calibration tokens sampled from the
model itself, 4 windows of 2048 tokens of the built-in sample a row. The model is quantized in its padded form (`--pad`),
whose dimensions are multiples of the group of 128 that TurboMind wants.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from demo_model import fetch
from provenance import provenance

import turbomind_quant as tmq

ROOT = Path(__file__).resolve().parents[1]
SEARCH = ["--pad", "--samples", "32", "--seqlen", "256", "--device", "cpu"]
PRESETS = ("rtn", "fast", "default")


def run_step(name: str, command: list[str], rows: list[dict[str, object]], capture: bool = False) -> str:
    """Run one command, show it, and append its seconds and peak memory to `rows`. Exits with its code if it fails."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE if capture else None, text=True)
    output = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        print(output, end="")
        print(f"demo: the step '{name}' ended with exit code {process.returncode}.", file=sys.stderr)
        sys.exit(process.returncode)
    peak_gib = usage.ru_maxrss / 2**20
    cpu = usage.ru_utime + usage.ru_stime
    rows.append(
        {
            "step": name,
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),  # of all threads: what the step costs on a machine that is busy
            "peak_rss_gib": round(peak_gib, 3),
        }
    )
    print(f"  [{name}: {seconds:.1f} s, {peak_gib:.2f} GiB]", flush=True)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "demo-out", help="folder for all results")
    parser.add_argument(
        "--record", type=Path, help="also write times, memory and perplexity to this JSON file"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the text that the model writes")
    options = parser.parse_args()
    out: Path = options.out
    if (out / "demo.json").exists():
        shutil.rmtree(
            out
        )  # a finished demo is ours to replace; anything else is left to the commands to judge
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows: list[dict[str, object]] = []
    (out / "source.gguf").unlink(missing_ok=True)
    (out / "source.gguf").symlink_to(fetch())
    model = str(out / "source.gguf")

    run_step("inspect", ["quantize", "inspect", model], rows)
    for preset in PRESETS:
        command = ["quantize", "awq", model, "-o", str(out / preset), "--preset", preset, *SEARCH]
        command += ["--seed", str(options.seed)]
        run_step(f"awq {preset}", [*command, "--kv-bits", "8"] if preset == "default" else command, rows)
    workspace = str(out / "workspace")
    run_step("pack", ["quantize", "pack", str(out / "default"), "-o", workspace], rows)
    run_step("verify", ["quantize", "verify", workspace, "--source", str(out / "default")], rows)
    judge = ["evaluate", "ppl", "--dataset", "builtin", "--windows", "4", "--device", "cpu"]
    paths = [model, *(str(out / preset) for preset in PRESETS), workspace]
    table = run_step("evaluate", [*judge, "--kl-windows", "4", "--json", *paths], rows, capture=True)
    kv8 = run_step("evaluate kv int8", [*judge, "--kv-bits", "8", "--json", workspace], rows, capture=True)
    total = time.perf_counter() - start
    cpu = round(sum(float(str(row["cpu_seconds"])) for row in rows), 2)
    rows.append(
        {"step": "total", "seconds": round(total, 2), "cpu_seconds": cpu, "peak_rss_gib": peak_of(rows)}
    )
    versions = {name: version(name) for name in ("transformers", "safetensors", "gguf")}
    document = {
        **provenance(f"CPU, {os.cpu_count()} cores", "bash scripts/demo.sh", **versions),
        "seed": options.seed,
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
        "rows": rows,
        "perplexity": json.loads(table)["rows"] + json.loads(kv8)["rows"],
        "size_bytes": sizes_of(model, [out / preset for preset in PRESETS], out / "workspace"),
    }
    text = json.dumps(document, indent=1) + "\n"
    (out / "demo.json").write_text(text, encoding="utf8")
    if options.record:
        options.record.write_text(text, encoding="utf8")
    show(document, out)


def sizes_of(model: str, checkpoints: list[Path], workspace: Path) -> list[int]:
    """Bytes of weights for each row of the table: the float model in fp16, the checkpoints, the workspace twice."""
    float_bytes = 2 * tmq.estimate(model, preset="rtn", group_size=64).plan.parameters
    packed = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in checkpoints]
    whole = sum(file.stat().st_size for file in workspace.rglob("*") if file.is_file())
    return [float_bytes, *packed, whole, whole]


def peak_of(rows: list[dict[str, object]]) -> float:
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return max([own, *(float(str(row["peak_rss_gib"])) for row in rows)])


def show(document: dict[str, object], out: Path) -> None:
    """The perplexity table and what to type next."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Perplexity, 4 windows of 2048 tokens of the built-in sample (lower is better)")
    for heading in ("", "perplexity", "over fp16", "KL", "top-1", "MiB on disk"):
        table.add_column(heading, justify="left" if not heading else "right")
    for line in table_lines(document):
        table.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    console.print(
        "Quantized with 32 x 256 tokens of text that the model wrote itself: less text and fewer windows than the full\n"
        "protocol, to rank methods in minutes; not comparable with published figures. A quantized weight takes 4.16 bits, but\n"
        "zero-padding to groups of 128 and the float embedding eat half of the gain in a model as small as this. Times: "
        f"{out / 'demo.json'}\n\nTalk to it:   .venv/bin/tmq chat {out / 'default'}\n"
        f"Serve it:     .venv/bin/tmq serve {out / 'default'}\nYour model:   .venv/bin/quantize awq MODEL -o OUT"
    )


def table_lines(document: dict[str, object]) -> list[tuple[str, ...]]:
    """Cells of the table's rows: the float model, each preset, the workspace, and the workspace with an int8 KV cache."""
    names = ["fp16 (the GGUF, dequantized)", *PRESETS, "TurboMind workspace", "the same, int8 KV cache"]
    rows = document["perplexity"]
    assert isinstance(rows, list)
    base = rows[0]["ppl"]
    lines = []
    sizes = document["size_bytes"]
    assert isinstance(sizes, list)
    for name, row, size in zip(names, rows, sizes, strict=True):
        compared = row is not rows[0] and row.get("kl") is not None
        lines.append(
            (
                name,
                f"{row['ppl']:.2f}",
                "" if row is rows[0] else f"+{row['ppl'] / base - 1:.1%}",
                f"{row['kl']:.3f}" if compared else "",
                f"{row['top1']:.1%}" if compared else "",
                f"{size / 2**20:.0f}",
            )
        )
    return lines


if __name__ == "__main__":
    main()
