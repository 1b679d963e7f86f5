"""Seconds and memory of `quantize awq` on a model of a named shape with random weights, with a breakdown by stage.

    python scripts/bench_quantize_speed.py [--shape 7b] [--layers 3] [--presets fast default best] [--out benchmarks]

Each preset runs once for each word of `--runs`, each time as a command in a process of its own. `plain` is the command as a user
gives it: the row `total` is its time from the start of the process to the end of the checkpoint, `block` the median of the time
from the end of one block to that of the next, `verify` is `quantize verify` of the checkpoint. `stages` runs it with a clock that
waits for the GPU at every stage, which gives the other rows. `kernels` lists the GPU's kernels by their time, `host` the Python
functions; both are also written to text files beside the results.
`host_peak_gib` is memory of the process beside the page cache. Everything but the results is removed at the end.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from provenance import provenance  # noqa: E402

GIB = 2**30
POLL_S = 0.05
TOP_KERNELS, NAME_WIDTH = 28, 84
RUNS = ("plain", "stages", "kernels", "host")
CHECKED = "verify"


def main(words: list[str] | None = None) -> None:
    args = parse(words)
    if args.job is not None:
        work(json.loads(args.job))
        return
    folder = Path(tempfile.mkdtemp(prefix="speed-", dir=args.work))
    rows: list[dict[str, Any]] = []
    try:
        text = make_source(args, folder)
        for preset in args.presets:
            rows += measure(args, folder, preset, text)
            write(args, rows)
    finally:
        shutil.rmtree(folder)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", default="7b", help="7b, 13b, 70b or tiny, as in engine/model/random_weights.py"
    )
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--presets", nargs="+", default=["fast", "default", "best"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--flags", default="", help="further flags of `quantize awq`, as one string, such as '--kv-bits 8'"
    )
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["plain", "stages"])
    parser.add_argument(
        "--work", type=Path, help="folder for the models, on the disk to be measured; the system's by default"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def make_source(args: argparse.Namespace, folder: Path) -> Path:
    """The checkpoint and the calibration text, made in a process of its own: this one keeps no GPU memory."""
    job = {"kind": "source", "shape": args.shape, "layers": args.layers, "folder": str(folder)}
    job |= {"tokens": args.samples * args.seqlen + 4096}
    begin = time.time()
    run_job(args, job)
    print(f"made the source in {time.time() - begin:.1f} s", flush=True)
    return folder / "text.txt"


def measure(args: argparse.Namespace, folder: Path, preset: str, text: Path) -> list[dict[str, Any]]:
    """The rows of one preset."""
    words = ["awq", str(folder / "model"), "-o", str(folder / "out"), "--preset", preset]
    words += ["--calib-data", str(text), "--samples", str(args.samples), "--seqlen", str(args.seqlen)]
    words += ["--device", args.device, *args.flags.split()]
    rows: list[dict[str, Any]] = []
    for kind in args.runs:
        job = {"kind": kind, "words": words, "device": args.device, "begun": time.time()}
        result = run_job(args, job)
        if kind in ("kernels", "host"):
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"profile-{args.shape}-{preset}-{kind}.txt").write_text(result["table"])
            print(f"\n{preset}, {kind}\n{result['table']}", flush=True)
        else:
            rows += rows_of(args, preset, kind, result)
        if kind == "plain":
            check = {"kind": "verify", "device": args.device, "begun": time.time()}
            check |= {"words": ["verify", str(folder / "out")]}
            rows.append(row_of(args, preset, CHECKED, run_job(args, check)))
        shutil.rmtree(folder / "out")
    return rows


def rows_of(args: argparse.Namespace, preset: str, kind: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    if kind == "plain":
        rows = [row_of(args, preset, "total", result)]
        if result["blocks"]:
            block = {**result, "seconds": statistics.median(result["blocks"])}
            rows.append(row_of(args, preset, "block", block))
        return rows
    return [
        row_of(args, preset, name, {**result, "seconds": seconds})
        for name, seconds in sorted(result["stages"].items(), key=lambda item: -item[1])
    ]


def row_of(args: argparse.Namespace, preset: str, stage: str, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "shape": args.shape,
        "layers": args.layers,
        "preset": preset,
        "gpus": 0 if args.device == "cpu" else 1,
        "samples": args.samples,
        "seqlen": args.seqlen,
        "stage": stage,
        "seconds": result["seconds"],
        "gpu_peak_gib": result["gpu_peak_gib"],
        "host_peak_gib": result["host_peak_gib"],
    }


def run_job(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """This script again, in a new process, for one job. Its last line is the result."""
    command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(job)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{job['kind']}: exit code {done.returncode}\n{done.stdout[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(job: dict[str, Any]) -> None:
    """In the new process: do the job and print its result as the last line."""
    if job["kind"] == "source":
        print(json.dumps(make_files(job)))
        return
    with peak_memory() as peak:
        result = run_command(job)
    result |= {"seconds": time.time() - job["begun"], "host_peak_gib": peak["bytes"] / GIB}
    import torch

    is_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    result["gpu_peak_gib"] = torch.cuda.max_memory_reserved() / GIB if is_gpu else 0.0
    print(json.dumps(result))


def make_files(job: dict[str, Any]) -> dict[str, Any]:
    from random_source import sizes, write_random_source, write_random_text

    folder = Path(job["folder"])
    write_random_source(folder / "model", job["shape"], job["layers"])
    words = sizes(job["shape"], job["layers"], "float16")["vocab_size"]
    write_random_text(folder / "text.txt", words, job["tokens"])
    return {}


def run_command(job: dict[str, Any]) -> dict[str, Any]:
    """`quantize` with these words, as its console script runs it, watched in the way that the job asks for."""
    import torch

    from quant.stage_clock import StageClock, measuring
    from turbomind_quant.cli.quantize import quantize

    def command() -> None:
        code = quantize.main(job["words"], prog_name="quantize", standalone_mode=False)
        if code:
            raise SystemExit(code)

    if job["kind"] == "host":
        return {"table": host_profile(command)}
    if job["kind"] == "kernels":
        kind = torch.profiler.ProfilerActivity
        activity = kind.CUDA if torch.cuda.is_available() else kind.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            command()
        return {"table": kernel_table(profile)}
    device = torch.device("cuda" if torch.cuda.is_available() and job["device"] != "cpu" else "cpu")
    imports = time.time() - job["begun"]
    clock = StageClock(device if job["kind"] == "stages" else torch.device("cpu"))
    with measuring(clock):
        command()
    stages = {"start of Python and imports": imports} | clock.seconds
    return {"stages": stages, "blocks": clock.block_seconds()}


def kernel_table(profile: Any) -> str:
    """The kernels that took most of the GPU's time: milliseconds, calls, share, name."""
    found = [
        ((event.self_device_time_total or event.self_cpu_time_total) / 1e3, event.count, event.key)
        for event in profile.key_averages()
    ]
    total = sum(milliseconds for milliseconds, _, _ in found) or 1.0
    lines = [f"{total:.0f} ms in {sum(count for _, count, _ in found)} kernels and copies"]
    for milliseconds, count, name in sorted(found, reverse=True)[:TOP_KERNELS]:
        lines.append(f"{milliseconds:9.1f} ms {count:7d} {milliseconds / total:4.0%} {name[:NAME_WIDTH]}")
    return "\n".join(lines)


def host_profile(command: Any) -> str:
    import cProfile
    import io
    import pstats

    profile = cProfile.Profile()
    profile.runcall(command)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(60)
    return text.getvalue().replace(f"{ROOT}/", "")


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """The largest anonymous and shared memory of this process inside, in bytes: the page cache is left out."""
    found, done = {"bytes": 0}, threading.Event()

    def poll() -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            parts = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
            found["bytes"] = max(found["bytes"], 1024 * sum(parts))
            if done.wait(POLL_S):
                return

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Document and table so far; what an earlier run measured at other settings stays."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() and args.device != "cpu" else "CPU"
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "quantize_speed.json"
    key = ("shape", "layers", "preset", "gpus", "samples", "seqlen")
    measured = {tuple(row[name] for name in key) for row in rows}
    before = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [row for row in before if tuple(row[name] for name in key) not in measured] + rows
    path.write_text(json.dumps(provenance(device) | {"rows": rows}, indent=1) + "\n")
    (args.out / "quantize_speed.md").write_text(table(rows))
    print(table(rows), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Speed of quantization",
        "",
        "`quantize awq` of models of these shapes with random weights (`scripts/bench_quantize_speed.py`). `total` is the whole command as a",
        "user gives it, `block` one block of it; the other stages are from a run that waits for the GPU at each of them.",
        "",
        "| shape | layers | preset | text | stage | seconds | GPU peak, GiB | host peak, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        layers = "all" if row["layers"] is None else row["layers"]
        lines.append(
            f"| {row['shape']} | {layers} | {row['preset']} | {row['samples']} x {row['seqlen']} | {row['stage']} "
            f"| {row['seconds']:.2f} | {row['gpu_peak_gib']:.1f} | {row['host_peak_gib']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
