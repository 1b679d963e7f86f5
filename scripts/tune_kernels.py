"""Find the fastest W4A16 tile for each shape and number of tokens on this GPU and write kernels/tuned/<gpu>.json.

Candidates are compiled in parallel processes first, checked against float32 products, then timed. Every measurement goes to
a JSON file as it is made, so that a run that is cut short still yields a table: `--from FILE` makes one without a GPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from kernel_timing import copies_for, measure_peaks, quiet_capture, time_graph
from torch import Tensor

from kernels.int4 import Quantized
from kernels.w4a16 import TILE_KINDS, Tile, multiprocessors, run_tile
from kernels.w4a16_gemm import GemmTile, schedule
from kernels.w4a16_gemv import GemvTile
from kernels.w4a16_layout import W4Weight, prepare
from kernels.w4a16_prefill import PrefillTile
from kernels.w4a16_unpack import DEPENDENT_MODES

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [
    (4096, 4096), (4096, 12288), (4096, 22016), (11008, 4096),
    (8192, 8192), (8192, 28672), (28672, 8192), (8192, 10240), (8192, 57344), (4096, 6144), (4096, 28672), (14336, 4096),
]  # fmt: skip
TOKENS = [1, 8, 16, 32, 64, 128, 256, 512, 1024]
START = time.time()


def kind_of(tile: Tile) -> str:
    return next(name for name, kind in TILE_KINDS.items() if isinstance(tile, kind))


def random_weight(rows: int, cols: int, group_size: int = 128, device: str = "cuda") -> Quantized:
    """Random codes and zeros, scales such that outputs of normal inputs are of size 1 to 10."""
    groups = cols // group_size
    return Quantized(
        torch.randint(0, 16, (rows, cols), dtype=torch.uint8, device=device),
        (torch.rand(rows, groups, device=device) * 0.004 + 0.001).half(),
        torch.randint(0, 16, (rows, groups), dtype=torch.uint8, device=device),
        group_size,
    )


def candidates(tokens: int) -> list[Tile]:
    """Tiles worth timing: each is first in some cell of a wider search, or differs from one that is by one step."""
    if tokens == 1:
        shapes = [(4, 8, 2), (8, 8, 4), (4, 16, 4), (8, 16, 4), (16, 8, 8), (8, 16, 8), (4, 32, 4), (8, 8, 2)]
        return [GemvTile(*shape, scales_ahead=ahead) for shape in shapes for ahead in (False, True)]
    tiles: list[Tile] = []

    def add(bm: int, bn: int, warps: int, stages: int, order: str, *per_sm: int) -> None:
        """order: "left" has the weights as left operand, "stacked" also as one dot, "right" and "late" (scaled last) not."""
        swap, first, stacked = order in ("left", "stacked"), order != "late", order == "stacked"
        tiles.extend(GemmTile(bm, bn, warps, stages, swap, first, count, stacked) for count in per_sm)

    if tokens <= 8:
        add(8, 64, 4, 5, "left", 2, 4)
        add(8, 128, 4, 4, "left", 1, 2, 3)
    if tokens <= 16:
        add(16, 64, 4, 4, "right", 4)
        add(16, 64, 2, 6, "right", 2, 4)
        add(16, 64, 2, 5, "late", 2, 3, 4, 6)
        add(16, 128, 4, 4, "right", 1, 2, 3)
        add(16, 128, 4, 4, "late", 2, 3)
        add(16, 128, 4, 4, "stacked", 2)
        add(16, 64, 4, 5, "stacked", 2, 4)
        add(16, 128, 8, 4, "stacked", 1, 2)
        add(16, 256, 8, 3, "stacked", 1)
    elif tokens <= 32:
        add(32, 64, 4, 4, "right", 2, 3)
        add(32, 64, 4, 5, "left", 0)
        add(32, 128, 4, 4, "left", 2)
        add(32, 128, 4, 4, "stacked", 2)
        add(32, 64, 4, 5, "stacked", 2, 0)
        add(32, 128, 8, 4, "stacked", 1, 0)
        add(32, 256, 8, 4, "stacked", 1, 0)
    elif tokens <= 64:
        add(64, 64, 4, 4, "left", 1, 0)
        add(64, 128, 4, 4, "left", 1, 2, 0)
        add(64, 64, 4, 4, "stacked", 2, 1, 0)
        add(64, 128, 4, 4, "stacked", 1, 0)
        add(64, 128, 8, 4, "stacked", 1, 0)
        add(64, 256, 8, 4, "stacked", 1, 0)
    elif tokens <= 128:
        add(128, 64, 4, 3, "left", 1, 2)
        add(128, 128, 4, 3, "left", 0)
        add(128, 128, 8, 3, "left", 0)
        add(64, 128, 8, 4, "stacked", 1)
        add(64, 256, 8, 4, "stacked", 1)
        add(128, 64, 4, 3, "stacked", 2, 1, 0)
        add(128, 128, 8, 4, "stacked", 1, 0)
        add(128, 256, 8, 4, "stacked", 1, 0)
    else:
        add(128, 256, 8, 4, "stacked", 1, 0)
        add(256, 128, 8, 3, "stacked", 1, 0)
        add(128, 128, 8, 4, "stacked", 1, 0)
        add(128, 256, 8, 4, "left", 0)
        tiles.append(PrefillTile(8192))
    return tiles


def is_worth_trying(tile: Tile, tokens: int, rows: int, cols: int, sms: int) -> bool:
    """Leave out schedules that give less than 2 blocks to a program, and whole tiles that fill less than half of the card."""
    if not isinstance(tile, GemmTile):
        return True
    blocks = cols // 128
    plan = schedule(tokens, rows, blocks, tile, sms)
    if tile.programs_per_sm == 0:
        return plan.programs >= sms // 2
    return plan.run >= 2


def binary_key(tile: Tile, tokens: int, rows: int, cols: int, group_size: int, sms: int) -> tuple[Any, ...]:
    """What decides which binary a launch compiles."""
    if isinstance(tile, GemmTile):
        plan = schedule(tokens, rows, cols // 128, tile, sms)
        fields: tuple[Any, ...] = (
            tile.bm,
            tile.bn,
            tile.warps,
            tile.stages,
            tile.swap,
            tile.scale_first,
            tile.stacked,
            plan.segments,
        )
    elif isinstance(tile, GemvTile):
        fields = (tile.bn, tile.blocks, tile.warps, tile.scales_ahead, cols % (tile.blocks * 128) == 0)
    else:
        fields = ()
    return (kind_of(tile), group_size, *fields)


def compile_worker(path: str) -> None:
    """Fill Triton's cache on disk: launch each job once."""
    for kind, fields, tokens, rows, cols, group_size in json.loads(Path(path).read_text()):
        tile = TILE_KINDS[kind](**fields)
        weight = prepare(random_weight(rows, cols, group_size))
        x = torch.zeros(tokens, cols, dtype=torch.float16, device="cuda")
        out = torch.empty(tokens, rows, dtype=torch.float16, device="cuda")
        for mode in ("never",) if isinstance(tile, PrefillTile) else DEPENDENT_MODES:
            try:
                variant = tile if isinstance(tile, PrefillTile) else replace(tile, dependent=mode)
                run_tile(variant, x, weight, out, is_dependent=True)
            except Exception as error:
                print(f"{kind} {fields}: {type(error).__name__} {str(error)[:300]}", flush=True)
        torch.cuda.synchronize()


def precompile(jobs: list[tuple[Tile, int, int, int, int]], limit_s: float) -> None:
    """Compile all binaries of the jobs (tile, tokens, rows, cols, group size), one process for each core."""
    sms = multiprocessors(torch.device("cuda"))
    distinct = {binary_key(*job, sms): job for job in jobs}
    rows: list[tuple[Any, ...]] = [(kind_of(tile), asdict(tile), *rest) for tile, *rest in distinct.values()]
    rows.sort(
        key=lambda row: -row[1].get("bm", 0) * row[1].get("bn", 0)
    )  # the slow ones first, spread over all processes
    count = max(1, (os.cpu_count() or 2) - 1)
    folder = Path(os.environ.get("TRITON_CACHE_DIR", "/tmp/triton-jobs"))
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for i in range(count):
        path = folder / f"jobs{i}.json"
        path.write_text(json.dumps(rows[i::count]))
        processes.append(
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("tune_kernels.py")), "--worker", str(path)]
            )
        )
    while time.time() - START < limit_s and any(p.poll() is None for p in processes):
        time.sleep(0.2)
    for process in processes:
        process.terminate()
    log(f"compiled {len(distinct)} binaries in {count} processes")


def log(message: str) -> None:
    print(f"[{time.time() - START:6.1f} s] {message}", flush=True)


@dataclass(frozen=True)
class Cell:
    """One weight shape and number of tokens: operands, the result in float32, and the time that a roofline allows."""

    x: Tensor
    copies: list[W4Weight]
    out: Tensor
    expected: Tensor
    roof_us: float


def measure(tile: Tile, cell: Cell) -> dict[str, float]:
    """Error and time of a tile, by way of launching it. Raises ValueError where the product is wrong."""
    result: dict[str, float] = {}
    for mode in ("never",) if isinstance(tile, PrefillTile) else DEPENDENT_MODES:
        variant = tile if isinstance(tile, PrefillTile) else replace(tile, dependent=mode)
        cell.out.fill_(float("nan"))
        run_tile(variant, cell.x, cell.copies[0], cell.out, is_dependent=True)
        error = float((cell.out.float() - cell.expected).norm() / cell.expected.norm())
        if not error < 1.5e-3:
            raise ValueError(f"relative error {error:.2e} launched {mode}")
        result |= {f"{mode}_us": time_tile(variant, cell), "error": error}
    return result


def time_tile(tile: Tile, cell: Cell) -> float:
    def call(i: int) -> None:
        run_tile(tile, cell.x, cell.copies[i], cell.out, is_dependent=True)

    return time_graph(call, len(cell.copies), 1.5 * cell.roof_us, 3).us


def tune(
    shapes: list[tuple[int, int]], tokens: list[int], output: Path, limit_s: float, compile_s: float
) -> None:
    quiet_capture()
    sms = multiprocessors(torch.device("cuda"))

    def tiles_of(m: int, k: int, n: int) -> list[Tile]:
        return [tile for tile in candidates(m) if is_worth_trying(tile, m, n, k, sms)]

    precompile(
        [(tile, m, n, k, 128) for k, n in shapes for m in tokens for tile in tiles_of(m, k, n)], compile_s
    )
    peaks = measure_peaks()
    log(f"{peaks.name} torch {torch.__version__} copy {peaks.copy_bytes_per_us / 1e3:.0f} GB/s")
    rows: list[dict[str, Any]] = []
    for k, n in shapes:
        quantized = random_weight(n, k)
        dense = quantized.dequantize()
        copies = [prepare(quantized)]
        copies += [clone(copies[0]) for _ in range(copies_for(copies[0].size_bytes, peaks.l2_bytes) - 1)]
        for m in tokens:
            x = torch.randn(m, k, device="cuda").half()
            roof = peaks.roof_us(copies[0].size_bytes + 2 * m * (k + n), 2 * m * k * n)
            cell = Cell(
                x, copies, torch.empty(m, n, dtype=x.dtype, device="cuda"), x.float() @ dense.t(), roof
            )
            found: list[tuple[float, str]] = []
            for tile in tiles_of(m, k, n):
                if time.time() - START > limit_s:
                    break
                row: dict[str, Any] = {"k": k, "n": n, "tokens": m, "kernel": kind_of(tile), **asdict(tile)}
                try:
                    row |= measure(tile, cell) | {"roof_us": roof}
                    label = " ".join(str(value) for value in asdict(tile).values())
                    shown = " ".join(f"{mode} {us:.2f}" for mode, us in times_of(row).items())
                    found.append((fastest_us(row), f"{label}: {shown}"))
                except (ValueError, RuntimeError) as failure:
                    row["failure"] = str(failure)[:200]
                    log(f"{row}")
                rows.append(row)
            log(
                f"K {k} N {n} M {m} roof {roof:.2f} us | " + " | ".join(text for _, text in sorted(found)[:4])
            )
            output.write_text(
                json.dumps({"gpu": peaks.name, "copy_gbps": peaks.copy_bytes_per_us / 1e3, "rows": rows})
            )


def clone(weight: W4Weight) -> W4Weight:
    return W4Weight(
        weight.words.clone(),
        weight.params.clone(),
        weight.bias,
        weight.in_features,
        weight.group_size,
        weight.is_paired,
    )


def make_table(measured: dict[str, Any]) -> dict[str, Any]:
    """The fastest tile of each cell, launched as it was fastest; beyond the measured tokens, dequantize-then-cuBLAS."""
    best: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in measured["rows"]:
        cell = (row["k"], row["n"], row["tokens"])
        if "never_us" in row and (cell not in best or fastest_us(row) < fastest_us(best[cell])):
            best[cell] = row
    entries = []
    for cell in sorted(best):
        row = best[cell]
        fields = TILE_KINDS[row["kernel"]].__dataclass_fields__
        entry = {key: row[key] for key in ("k", "n", "tokens", "kernel", *fields) if key in row}
        if "dependent" in fields:
            entry["dependent"] = min(times_of(row), key=lambda mode: times_of(row)[mode])
        entries.append(entry)
    shapes = sorted({(k, n) for k, n, _ in best})
    entries += [{"k": k, "n": n, "tokens": 1 << 20, "kernel": "prefill", "rows": 8192} for k, n in shapes]
    return {"gpu": measured["gpu"], "note": "Written by scripts/tune_kernels.py.", "entries": entries}


def times_of(row: dict[str, Any]) -> dict[str, float]:
    """Microseconds by way of launching: "never" is the plain launch."""
    return {mode: row[f"{mode}_us"] for mode in DEPENDENT_MODES if f"{mode}_us" in row}


def fastest_us(row: dict[str, Any]) -> float:
    return min(times_of(row).values())


def write_table(measured: dict[str, Any], folder: Path) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", measured["gpu"].lower()) + ".json"
    table = make_table(measured)
    lines = ",\n".join("    " + json.dumps(entry) for entry in table["entries"])
    head = f'  "gpu": {json.dumps(table["gpu"])},\n  "note": {json.dumps(table["note"])},\n'
    (folder / name).write_text("{\n" + head + '  "entries": [\n' + lines + "\n  ]\n}\n")
    return folder / name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("tune.json"), help="every measurement, as JSON")
    parser.add_argument(
        "--table-dir", type=Path, default=ROOT / "kernels" / "tuned", help="where the table goes"
    )
    parser.add_argument(
        "--from", dest="source", type=Path, help="make the table of this file of measurements, without a GPU"
    )
    parser.add_argument("--shapes", help="K x N, such as 4096x4096,4096x12288")
    parser.add_argument("--tokens", help="numbers of tokens, such as 1,8,16")
    parser.add_argument(
        "--limit-s", type=float, default=1800.0, help="start no measurement after this many seconds"
    )
    parser.add_argument(
        "--compile-s", type=float, default=600.0, help="stop compiling after this many seconds"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        compile_worker(arguments.worker)
        return
    if arguments.source is None:
        shapes = SHAPES
        if arguments.shapes:
            shapes = [(int(k), int(n)) for k, n in (text.split("x") for text in arguments.shapes.split(","))]
        tokens = TOKENS if not arguments.tokens else [int(m) for m in arguments.tokens.split(",")]
        tune(shapes, tokens, arguments.output, arguments.limit_s, arguments.compile_s)
    print(write_table(json.loads((arguments.source or arguments.output).read_text()), arguments.table_dir))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
