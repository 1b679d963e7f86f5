"""One token through float weights: tiles and ways of starting of `kernels/block/dense_gemv.py` beside cuBLAS, in a chain and alone.

Every product is checked against float64 before it is timed. First the products and norms of a 7B layer as one chain, each
behind the other as in a decode step (attention left out), then each shape alone: there a product stands behind its like. The
copy bandwidth is measured in the same run; a share is bytes of weights over it, and reading alone can exceed 100 %.
Writes gemv.json as it goes. `--engine` measures fp16 decoding of the 7B shape with cuBLAS and with several tiles instead.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from kernel_timing import Peaks, copies_for, measure_peaks, quiet_capture, time_graph, wait_or_stop
from provenance import provenance
from torch import Tensor

from kernels.block import dense_gemv
from kernels.block.dense_gemv import DenseTile, default_tile, launch_dense_gemv
from kernels.block.fused import add_rms_norm, silu_mul

ROOT = Path(__file__).resolve().parents[1]
SIZES = [(4, 1024, 4), (8, 512, 2), (2, 2048, 8), (8, 1024, 4), (4, 2048, 8), (4, 512, 2)]  # rows, k, warps
FIRST_WAYS = [("never", 0), ("waited", 0), ("waited", 32)]
OTHER_WAYS = [("early", 0), ("early", 32), ("waited", 16), ("late", 32), ("never", 32)]
TILES = [DenseTile(*size, *way) for way in FIRST_WAYS + OTHER_WAYS for size in SIZES]
LAYER = [
    (4096, 12288, False),
    (4096, 4096, False),
    (4096, 22016, True),
    (11008, 4096, False),
]  # qkv, o, gate and up, down
HIDDEN = 4096
START = time.time()


class Shape(NamedTuple):
    """K x N weights, and what follows the product: silu(gate) * up, or float32 logits."""

    k: int
    n: int
    gated: bool = False
    out_dtype: torch.dtype = torch.float16


SHAPES = [
    *(Shape(*shape) for shape in LAYER), Shape(4096, 22016), Shape(4096, 32000, out_dtype=torch.float32),
    Shape(8192, 8192), Shape(8192, 28672), Shape(28672, 8192),
]  # fmt: skip


def log(message: str) -> None:
    print(f"[{time.time() - START:6.1f} s] {message}", flush=True)


def name_of(tile: DenseTile) -> str:
    asks = f" asks {tile.ask_mib}" if tile.ask_mib else ""
    return f"{tile.bn}x{tile.bk}/{tile.warps} {tile.dependent}{asks}"


def random_weight(n: int, k: int) -> Tensor:
    return torch.randn(n, k, device="cuda", dtype=torch.float16) / k**0.5


def by_cublas(x: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    product = F.linear(x, weight)
    return silu_mul(product, pdl=True) if shape.gated else product.to(shape.out_dtype)


def by_kernel(x: Tensor, weight: Tensor, shape: Shape, tile: DenseTile) -> Tensor:
    return launch_dense_gemv(x, weight, None, shape.gated, shape.out_dtype, tile=tile)


def compile_worker(part: int, parts: int) -> None:
    """Fill Triton's cache on disk with this worker's part of the binaries: no size is compiled in, K even or not is."""
    kinds = {(shape.k % 2048 == 0, shape.gated, shape.out_dtype): shape.k for shape in SHAPES}
    jobs = [(tile, k, gated, out_dtype) for tile in TILES for (_, gated, out_dtype), k in kinds.items()]
    for tile, k, gated, out_dtype in jobs[part::parts]:
        shape = Shape(k, 64, gated, out_dtype)
        x = torch.zeros(1, k, device="cuda", dtype=torch.float16)
        by_kernel(x, random_weight(64, k), shape, tile)
    torch.cuda.synchronize()


def precompile(limit_s: float) -> None:
    count = max(1, (os.cpu_count() or 2) - 1)
    workers = [
        subprocess.Popen([sys.executable, __file__, "--worker", str(i), str(count)]) for i in range(count)
    ]
    late = wait_or_stop(workers, START + limit_s)
    log(f"compiled in {count} processes, {late} of them stopped at the limit")


def expected(x: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    """(1, N) or (1, N / 2) in float64."""
    wide = torch.cat([x.double() @ part.double().t() for part in weight.split(8192)], 1)
    if not shape.gated:
        return wide
    gate, up = wide.chunk(2, -1)
    return F.silu(gate) * up


def error_of(got: Tensor, right: Tensor, most: float = 1.5e-3) -> float:
    """Relative error. Raises ValueError where the product is wrong."""
    error = float((got.double() - right).norm() / right.norm())
    if not error < most:
        raise ValueError(f"relative error {error:.1e}")
    return error


def measure(
    shape: Shape, peaks: Peaks, limit_s: float, rows: list[dict[str, Any]], save: Callable[[], None]
) -> None:
    """Rows of one shape: cuBLAS, all tiles in the first ways of starting, the two fastest in the others, and the default."""
    size_bytes = 2 * shape.k * shape.n
    copies = [random_weight(shape.n, shape.k) for _ in range(copies_for(size_bytes, peaks.l2_bytes))]
    x = torch.randn(1, shape.k, device="cuda").half()
    right = expected(x, copies[0], shape)
    roof_us = size_bytes / peaks.copy_bytes_per_us
    times: dict[str, float] = {}

    def add(name: str, tile: DenseTile | None) -> None:
        if name in times or time.time() - START > limit_s:
            return

        def product(weight: Tensor) -> Tensor:
            return by_cublas(x, weight, shape) if tile is None else by_kernel(x, weight, shape, tile)

        error = error_of(product(copies[0]), right)
        timing = time_graph(lambda i: product(copies[i]), len(copies), roof_us, 5)
        times[name] = timing.us
        rows.append(
            {"k": shape.k, "n": shape.n, "gated": shape.gated, "out_dtype": str(shape.out_dtype), "name": name,
             "tile": None if tile is None else asdict(tile), "us": timing.us, "spread": timing.spread, "error": error,
             "share": roof_us / timing.us, "is_default": tile == default_tile(shape.n)}
        )  # fmt: skip
        save()

    add("cuBLAS", None)
    add(name_of(default_tile(shape.n)), default_tile(shape.n))
    for way in FIRST_WAYS:
        for size in SIZES:
            add(name_of(DenseTile(*size, *way)), DenseTile(*size, *way))
    first = [(times.get(name_of(DenseTile(*size, *way))), size) for size in SIZES for way in FIRST_WAYS]
    fastest = dict.fromkeys(size for us, size in sorted((us, size) for us, size in first if us is not None))
    for size in list(fastest)[:2]:
        for way in OTHER_WAYS:
            add(name_of(DenseTile(*size, *way)), DenseTile(*size, *way))
    default_name = name_of(default_tile(shape.n))
    if default_name in times:
        best = min((name for name in times if name != "cuBLAS"), key=lambda name: times[name])
        log(
            f"K {shape.k} N {shape.n}{' gated' if shape.gated else ''}: cuBLAS {times['cuBLAS']:.2f} us, default {times[default_name]:.2f}, "
            f"best {times[best]:.2f} ({best}, {100 * roof_us / times[best]:.0f} % of the copy bandwidth)"
        )


def measure_chain(peaks: Peaks, limit_s: float, rows: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """A 7B layer without its attention: norm, qkv, o of its first columns, norm, gate and up, down; microseconds a layer."""
    shapes = [Shape(*shape) for shape in LAYER]
    layers = [[random_weight(shape.n, shape.k) for shape in shapes] for _ in range(3)]
    norm = torch.ones(HIDDEN, device="cuda", dtype=torch.float16)
    begin = torch.randn(1, HIDDEN, device="cuda").half()
    size_bytes = sum(2 * k * n for k, n, _ in LAYER)
    roof_us = size_bytes / peaks.copy_bytes_per_us

    def layer(
        weights: list[Tensor], x: Tensor, delta: Tensor, tile: DenseTile | None, default: bool
    ) -> tuple[Tensor, Tensor]:
        def product(i: int, h: Tensor) -> Tensor:
            if tile is None and not default:
                return by_cublas(h, weights[i], shapes[i])
            chosen = default_tile(shapes[i].n) if tile is None else tile
            return by_kernel(h, weights[i], shapes[i], chosen)

        x, h = add_rms_norm(x, delta, norm, 1e-6, pdl=True)
        x, h = add_rms_norm(x, product(1, product(0, h)[:, :HIDDEN]), norm, 1e-6, pdl=True)
        return x, product(3, product(2, h))

    right = torch.cat(layer(layers[0], begin, begin, None, False)).double()
    choices: list[tuple[str, DenseTile | None, bool]] = [("cuBLAS", None, False), ("default", None, True)]
    for name, tile, default in choices + [(name_of(tile), tile, False) for tile in TILES]:
        if time.time() - START > limit_s:
            break
        error = error_of(torch.cat(layer(layers[0], begin, begin, tile, default)), right, 5e-3)

        def again(i: int, tile: DenseTile | None = tile, default: bool = default) -> object:
            return layer(layers[i], begin, begin, tile, default)

        timing = time_graph(again, 3, roof_us, 5)
        rows.append(
            {"name": name, "tile": None if tile is None else asdict(tile), "us": timing.us, "spread": timing.spread,
             "error": error, "share": roof_us / timing.us}
        )  # fmt: skip
        save()
    for row in sorted(rows, key=lambda row: float(row["us"]))[:6] + rows[:2]:
        log(
            f"chain of a layer: {row['us']:.2f} us, {100 * row['share']:.0f} % of the copy bandwidth: {row['name']}"
        )


def measure_engine(
    peaks: Peaks, names: list[str], rows: list[dict[str, Any]], save: Callable[[], None]
) -> None:
    """fp16 decoding of the 7B shape at batch 1, prompt 512: with cuBLAS, the default tiles and the tiles named."""
    from throughput_report import STATIC, contender

    from engine.measure.throughput import open_bench
    from engine.model import layers

    tiles = {name_of(tile): tile for tile in TILES}
    kernel_takes = layers._takes_gemv
    for name in ["default", "cuBLAS", *names]:
        if name == "cuBLAS":
            layers._takes_gemv = lambda x, weight: False  # the switch: everything through cuBLAS
        elif name != "default":
            dense_gemv.default_tile = lambda rows, tile=tiles[name]: tile
        try:
            config = replace(STATIC, max_batch=1, graph_batches=(1,))
            with open_bench(contender("fp16", config, "7b"), peaks.copy_bytes_per_us * 1e6) as bench:
                bench.static(1, 512, 2)  # compiles and captures
                row = bench.static(1, 512, 128)
                limit = bench.bandwidth / bench.weight_bytes()
        finally:
            layers._takes_gemv, dense_gemv.default_tile = kernel_takes, default_tile
        rows.append(
            {"name": name, "tok_per_s": row.tok_per_s, "share_of_weights_limit": row.tok_per_s / limit}
        )
        save()
        log(
            f"fp16 decode, batch 1, {name}: {row.tok_per_s:.1f} tok/s, {100 * row.tok_per_s / limit:.1f} % of the limit"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of gemv.json")
    parser.add_argument(
        "--limit-s", type=float, default=55.0, help="start no measurement after this many seconds"
    )
    parser.add_argument(
        "--compile-s", type=float, default=30.0, help="stop waiting for compilation after this many seconds"
    )
    parser.add_argument(
        "--engine", nargs="*", metavar="TILE",
        help='instead measure decoding: default, cuBLAS and these tiles, as gemv.json names them ("4x1024/4 waited asks 32")',
    )  # fmt: skip
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        compile_worker(*arguments.worker)
        return
    unknown = set(arguments.engine or ()) - {name_of(tile) for tile in TILES}
    if unknown:
        parser.error(f"no tiles: {sorted(unknown)}; expected some of {[name_of(tile) for tile in TILES]}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    peaks = measure_peaks()
    document = provenance(peaks.name, triton=triton.__version__) | {
        "copy_gbps": peaks.copy_bytes_per_us / 1e3, "chain": [], "rows": [], "engine": [],
    }  # fmt: skip
    file = arguments.out / ("gemv.json" if arguments.engine is None else "gemv_engine.json")

    def save() -> None:
        file.write_text(json.dumps(document, indent=1) + "\n")

    log(f"{peaks.name}, copy {document['copy_gbps']:.0f} GB/s")
    if arguments.engine is not None:
        measure_engine(peaks, arguments.engine, document["engine"], save)
        return
    quiet_capture()
    precompile(arguments.compile_s)
    measure_chain(peaks, arguments.limit_s, document["chain"], save)
    for shape in SHAPES:
        measure(shape, peaks, arguments.limit_s, document["rows"], save)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
