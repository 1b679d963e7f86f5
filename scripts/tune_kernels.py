"""Find the fastest W4A16 tile for each shape and number of tokens on this GPU and write kernels/tuned/<gpu>.json.

Candidates are compiled in parallel processes first, checked against float32 products, then timed. Every measurement goes to
a JSON file as it is made, so that a run that is cut short still yields a table: `--from FILE` makes one without a GPU.
`--refine` times the tiles of `w4_wgmma`, of one token those of `w4_gemv`, beside the present choice alone and keeps what the table says of other cells.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from kernel_timing import copies_for, measure_peaks, quiet_capture, time_graph, wait_or_stop
from tile_candidates import (
    binary_key,
    candidates,
    gemv_tiles,
    is_worth_trying,
    kind_of,
    modes_of,
    wgmma_tiles,
)
from torch import Tensor
from triton.errors import TritonError

from kernels.int4 import Quantized
from kernels.w4a16.layout import W4Weight, prepare
from kernels.w4a16.prefill import PrefillTile
from kernels.w4a16.product import TILE_KINDS, Size, Tile, has_wgmma, multiprocessors, pick, run_tile, table_of
from kernels.w4a16.unpack import DEPENDENT_MODES

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [
    (4096, 4096), (4096, 12288), (4096, 22016), (11008, 4096),
    (8192, 8192), (8192, 28672), (28672, 8192), (8192, 10240), (8192, 57344), (4096, 6144), (4096, 28672), (14336, 4096),
]  # fmt: skip
TOKENS = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
END = 1 << 20  # tokens of the entry behind the measured ones
NEAR = 1.01  # a tile may be so much slower than the fastest where it is that of other shapes too
TILES = Callable[[int, int, int], list[Tile]]  # candidates of tokens, rows, cols
START = time.time()


def random_weight(rows: int, cols: int, group_size: int = 128, device: str = "cuda") -> Quantized:
    """Random codes and zeros, scales such that outputs of normal inputs are of size 1 to 10."""
    groups = cols // group_size
    return Quantized(
        torch.randint(0, 16, (rows, cols), dtype=torch.uint8, device=device),
        (torch.rand(rows, groups, device=device) * 0.004 + 0.001).half(),
        torch.randint(0, 16, (rows, groups), dtype=torch.uint8, device=device),
        group_size,
    )


Job = tuple[Tile, str, int, int, int, int]  # tile, way of starting, tokens, rows, cols, group size


def started(tile: Tile, mode: str) -> Tile:
    """The tile with its way of starting the kernel behind it."""
    return tile if isinstance(tile, PrefillTile) else replace(tile, dependent=mode)


def compile_worker(path: str) -> None:
    """Fill Triton's cache on disk: launch each job once."""
    weights: dict[tuple[int, int, int], W4Weight] = {}
    for kind, fields, mode, tokens, rows, cols, group_size in json.loads(Path(path).read_text()):
        tile = started(TILE_KINDS[kind](**fields), mode)
        try:
            if (rows, cols, group_size) not in weights:
                weights = {(rows, cols, group_size): prepare(random_weight(rows, cols, group_size))}
            x = torch.zeros(tokens, cols, dtype=torch.float16, device="cuda")
            out = torch.empty(tokens, rows, dtype=torch.float16, device="cuda")
            run_tile(tile, x, weights[rows, cols, group_size], out, is_dependent=True)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{kind} {fields}: {type(error).__name__} {str(error)[:300]}", flush=True)


def precompile(jobs: list[Job], limit_s: float) -> None:
    """Compile all binaries of the jobs, one process for each core."""
    sms = multiprocessors(torch.device("cuda"))
    distinct = {binary_key(*job, sms): job for job in jobs}
    rows: list[tuple[Any, ...]] = [(kind_of(tile), asdict(tile), *rest) for tile, *rest in distinct.values()]
    rows.sort(
        key=lambda row: -row[1].get("bm", 0) * row[1].get("bn", 0)
    )  # the slow ones first, over all processes
    count = max(1, (os.cpu_count() or 2) - 1)
    folder = Path(os.environ.get("TRITON_CACHE_DIR", "/tmp/triton-jobs"))
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for i in range(count):
        path = folder / f"jobs{i}.json"
        path.write_text(
            json.dumps(sorted(rows[i::count], key=lambda row: row[4:6]))
        )  # a weight is made once for its jobs
        processes.append(
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("tune_kernels.py")), "--worker", str(path)]
            )
        )
    late = wait_or_stop(processes, START + limit_s)
    log(f"compiled {len(distinct)} binaries in {count} processes, {late} of them stopped at the limit")


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


def measure(tile: Tile, mode: str, cell: Cell) -> dict[str, float]:
    """Error and time of a tile, started in one way. Raises ValueError where the product is wrong."""
    variant = started(tile, mode)
    cell.out.fill_(float("nan"))
    run_tile(variant, cell.x, cell.copies[0], cell.out, is_dependent=True)
    error = float((cell.out.float() - cell.expected).norm() / cell.expected.norm())
    if not error < 1.5e-3:
        raise ValueError(f"relative error {error:.2e} launched {mode}")
    return {f"{mode}_us": time_tile(variant, cell), "error": error}


def measure_cell(tiles: list[Tile], cell: Cell, head: dict[str, Any], limit_s: float) -> list[dict[str, Any]]:
    """All tiles started in two ways, then the fastest three also in the others."""
    rows: list[dict[str, Any]] = []

    def time_modes(row: dict[str, Any], tile: Tile, modes: tuple[str, ...]) -> None:
        for mode in modes:
            if "failure" not in row and f"{mode}_us" not in row and time.time() - START < limit_s:
                try:
                    row |= measure(tile, mode, cell)
                except (ValueError, RuntimeError, TritonError) as failure:
                    row["failure"] = str(failure)[:200]
                    log(f"{row}")

    for tile in tiles:
        rows.append({**head, "kernel": kind_of(tile), **asdict(tile), "roof_us": cell.roof_us})
        time_modes(rows[-1], tile, modes_of(tile, head["tokens"])[0])
    timed = [(fastest_us(row), i) for i, row in enumerate(rows) if times_of(row) and "failure" not in row]
    for _, i in sorted(timed)[:3]:
        time_modes(rows[i], tiles[i], modes_of(tiles[i], head["tokens"])[1])
    found = [(fastest_us(rows[i]), i) for _, i in timed if "failure" not in rows[i]]
    lines = []
    for _, i in sorted(found)[:4]:
        label = " ".join(str(value) for value in [kind_of(tiles[i]), *asdict(tiles[i]).values()])
        lines.append(f"{label}: " + " ".join(f"{mode} {us:.2f}" for mode, us in times_of(rows[i]).items()))
    log(f"K {head['k']} N {head['n']} M {head['tokens']} roof {cell.roof_us:.2f} us | " + " | ".join(lines))
    return rows


def time_tile(tile: Tile, cell: Cell) -> float:
    def call(i: int) -> None:
        run_tile(tile, cell.x, cell.copies[i], cell.out, is_dependent=True)

    return time_graph(call, len(cell.copies), 1.5 * cell.roof_us, 3).us


def all_tiles(device: torch.device) -> TILES:
    sms = multiprocessors(device)
    return lambda tokens, rows, cols: candidates(tokens, rows, cols, sms)


def refining_tiles(device: torch.device) -> TILES:
    """What the table says without `w4_wgmma`, then the tiles of `w4_wgmma`; of one token those of `w4_gemv`."""
    sms, table = multiprocessors(device), table_of(device)
    if not has_wgmma(device.index or 0):
        raise SystemExit("--refine: this GPU or this Triton has no w4_wgmma.")

    def tiles(tokens: int, rows: int, cols: int) -> list[Tile]:
        present = pick(table, tokens, Size(rows, cols))
        if tokens == 1:
            return [present] + [t for t in gemv_tiles() if started(t, present.dependent) != present]
        return [present] + [t for t in wgmma_tiles(tokens) if is_worth_trying(t, tokens, rows, cols, sms)]

    return tiles


def tune(
    shapes: list[tuple[int, int]],
    tokens: list[int],
    output: Path,
    limit_s: float,
    compile_s: float,
    tiles: TILES,
) -> None:
    quiet_capture()

    precompile(
        [
            (tile, mode, m, n, k, 128)
            for k, n in shapes
            for m in tokens
            for tile in tiles(m, n, k)
            for mode in sum(modes_of(tile, m), ())
        ],
        compile_s,
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
            head = {"k": k, "n": n, "tokens": m}
            rows += measure_cell(tiles(m, n, k), cell, head, limit_s)
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


Place = tuple[int, int, int]  # K, N, tokens


def make_table(measured: dict[str, Any], kept: list[dict[str, Any]]) -> dict[str, Any]:
    """A tile for each cell, launched as it was fastest; beyond the measured tokens, dequantize-then-cuBLAS.

    Where `w4_wgmma` is chosen, the fastest of the others stands behind it, for a Triton without Gluon. `kept` are
    entries of the table before; those of measured cells are left out.
    """
    cells: dict[Place, dict[str, tuple[float, dict[str, Any]]]] = {}  # by cell and entry: time
    for row in measured["rows"]:
        if "failure" not in row:
            for mode, us in times_of(row).items():
                entry = entry_of(row, mode)
                cells.setdefault((row["k"], row["n"], row["tokens"]), {})[key_of(entry)] = us, entry
    entries = [entry for entry in kept if (entry["k"], entry["n"], entry["tokens"]) not in cells]
    for cell, chosen in few_tiles(cells).items():
        entries.append(chosen)
        others = [pair for pair in cells[cell].values() if pair[1]["kernel"] != "wgmma"]
        if chosen["kernel"] == "wgmma" and others:
            entries.append(min(others, key=lambda pair: pair[0])[1])
    ended = {(entry["k"], entry["n"]) for entry in entries if entry["tokens"] == END}
    shapes = {(k, n) for k, n, _ in cells} - ended
    entries += [{"k": k, "n": n, "tokens": END, "kernel": "prefill", "rows": 8192} for k, n in shapes]
    entries.sort(key=lambda entry: (entry["k"], entry["n"], entry["tokens"]))
    return {"gpu": measured["gpu"], "note": "Written by scripts/tune_kernels.py.", "entries": entries}


def few_tiles(cells: dict[Place, dict[str, tuple[float, dict[str, Any]]]]) -> dict[Place, dict[str, Any]]:
    """For each cell a tile within NEAR of the fastest, the same for as many shapes as can be: each tile is compiled once."""
    near = {
        cell: {
            key: pair for key, pair in tiles.items() if pair[0] <= NEAR * min(us for us, _ in tiles.values())
        }
        for cell, tiles in cells.items()
    }
    chosen = {}
    for tokens in {tokens for _, _, tokens in cells}:
        left = sorted(cell for cell in cells if cell[2] == tokens)
        while left:
            keys = sorted({key for cell in left for key in near[cell]})
            most = max(keys, key=lambda key: sum(key in near[cell] for cell in left))
            chosen |= {cell: near[cell][most][1] for cell in left if most in near[cell]}
            left = [cell for cell in left if most not in near[cell]]
    return chosen


def key_of(entry: dict[str, Any]) -> str:
    """What makes two entries the same tile, whatever the shape."""
    return json.dumps({name: value for name, value in entry.items() if name not in ("k", "n", "tokens")})


def entry_of(row: dict[str, Any], mode: str) -> dict[str, Any]:
    fields = TILE_KINDS[row["kernel"]].__dataclass_fields__
    entry = {key: row[key] for key in ("k", "n", "tokens", "kernel", *fields) if key in row}
    return {**entry, "dependent": mode} if "dependent" in fields else entry


def times_of(row: dict[str, Any]) -> dict[str, float]:
    """Microseconds by way of launching: "never" is the plain launch."""
    return {mode: row[f"{mode}_us"] for mode in DEPENDENT_MODES if f"{mode}_us" in row}


def fastest_us(row: dict[str, Any]) -> float:
    return min(times_of(row).values())


def write_table(measured: dict[str, Any], folder: Path, keep: bool) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", measured["gpu"].lower()) + ".json"
    kept = json.loads((folder / name).read_text())["entries"] if keep else []
    table = make_table(measured, kept)
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
    parser.add_argument(
        "--refine", action="store_true", help="w4_wgmma (one token: w4_gemv) and the present choice alone"
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
        tiles = (refining_tiles if arguments.refine else all_tiles)(torch.device("cuda", 0))
        tune(shapes, tokens, arguments.output, arguments.limit_s, arguments.compile_s, tiles)
    measured = json.loads((arguments.source or arguments.output).read_text())
    print(write_table(measured, arguments.table_dir, arguments.refine))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
