"""Kernel benchmarks of one run, side by side: W4A16 products against cuBLAS fp16 and published kernels, then decode attention.

Correctness comes before timing: relative Frobenius error against float32 products of the dequantized weights. Copy
bandwidth and the fp16 peak are measured in the same run, and each time is also given as a share of that roofline.
Writes kernels.json as it goes and kernels.md at the end.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_peers import MODULES, PEERS, Cublas, Ours, OursDependent, Peer
from kernel_timing import Peaks, copies_for, measure_peaks, quiet_capture, time_graph, wait_or_stop
from provenance import provenance
from triton.errors import TritonError
from tune_kernels import precompile, random_weight

from kernels.w4a16.layout import prepare
from kernels.w4a16.product import has_wgmma, pick, table_of

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [
    (4096, 22016),
    (4096, 4096),
    (4096, 12288),
    (11008, 4096),
    (8192, 8192),
    (28672, 8192),
    (8192, 28672),
]  # small products first: where time runs out, the large ones are missing, which are nearest to the roofline
GROUP_64 = [(4096, 22016), (8192, 8192)]
TOKENS = [1, 8, 16, 64, 128, 2, 4, 32, 256, 512, 2048]  # the ones that have a target first
SLOW = {"tinygemm": 128, "gemlite": 512}  # peers that are not timed above so many tokens: ms each, far behind
TARGETS = {
    (4096, 4096): {1: 3.0, 8: 2.2, 16: 2.4, 64: 1.5, 128: 1.1},
    (4096, 12288): {1: 3.3, 8: 3.0, 16: 2.9, 64: 2.0, 128: 1.4},
    (11008, 4096): {1: 3.3, 8: 3.0, 16: 2.9, 64: 2.0, 128: 1.4},
    (4096, 22016): {1: 3.5, 8: 3.3, 16: 3.1, 64: 2.2, 128: 1.5},
    (8192, 8192): {1: 3.5, 8: 3.3, 16: 3.1, 64: 2.2, 128: 1.5},
    (8192, 28672): {1: 3.65, 8: 3.6, 16: 3.4, 64: 2.4, 128: 1.6},
    (28672, 8192): {1: 3.65, 8: 3.6, 16: 3.4, 64: 2.4, 128: 1.6},
}
LARGE = {256: 0.8, 512: 0.8, 2048: 0.9}
START = time.time()


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__}
    for package in ("humming-kernels", "gemlite"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed: left out"
    return found


def is_there(peer: type[Peer]) -> bool:
    return peer.name not in MODULES or importlib.util.find_spec(MODULES[peer.name]) is not None


def warm_worker(path: str) -> None:
    """Let a peer that compiles at its first call fill its cache on disk, in a process of its own."""
    for name, k, n, tokens in json.loads(Path(path).read_text()):
        kind = next(peer for peer in PEERS if peer.name == name)
        peer = kind(random_weight(n, k))
        for m in tokens:
            peer.product(torch.zeros(m, k, dtype=peer.dtype, device="cuda"), peer.parts)
        torch.cuda.synchronize()


def start_warm_workers(shapes: list[tuple[int, int]], tokens: list[int]) -> list[subprocess.Popen[bytes]]:
    folder = Path(os.environ.get("TRITON_CACHE_DIR", "/tmp/triton-jobs"))
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for name in (peer.name for peer in PEERS if peer.name in MODULES and is_there(peer)):
        for i, (k, n) in enumerate(shapes):
            path = folder / f"warm-{name}{i}.json"
            path.write_text(json.dumps([(name, k, n, [m for m in tokens if m <= SLOW.get(name, m)])]))
            processes.append(subprocess.Popen([sys.executable, __file__, "--worker", str(path)]))
    return processes


def measure_peer(peer: Peer, m: int, k: int, dense: torch.Tensor, peaks: Peaks) -> dict[str, Any]:
    """Error and time of one product. Raises ValueError where the result is wrong."""
    n = dense.shape[0]
    x = torch.randn(m, k, device="cuda").to(peer.dtype)
    expected = x.float() @ dense.t()
    error = float((peer.product(x, peer.parts).float() - expected).norm() / expected.norm())
    if not error < 0.02:
        raise ValueError(f"relative error {error:.1e}")
    roof = peaks.roof_us(peer.size_bytes + 2 * m * (k + n), 2 * m * k * n)
    timing = time_graph(peer.call(x), len(peer.copies), 1.5 * roof, 5)
    return {
        "us": timing.us,
        "spread": timing.spread,
        "error": error,
        "roof_us": roof,
        "share": roof / timing.us,
    }


def bench_products(
    shapes: list[tuple[int, int]],
    tokens: list[int],
    group_size: int,
    peaks: Peaks,
    limit_s: float,
    rows: list[dict[str, Any]],
    save: Callable[[], None],
) -> None:
    """Append a row for each shape, peer and number of tokens to `rows`, and save after each."""
    for k, n in shapes:
        quantized = random_weight(n, k, group_size)
        dense = quantized.dequantize()
        for kind in PEERS:
            if not is_there(kind) or time.time() - START > limit_s:
                continue
            try:
                peer = kind(quantized)
                peer.rotate(copies_for(peer.size_bytes, peaks.l2_bytes))
            except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as failure:
                log(f"{kind.name} K {k} N {n}: {type(failure).__name__} {str(failure)[:200]}")
                continue
            line = []
            for m in tokens:
                if m > SLOW.get(peer.name, m) or time.time() - START > limit_s:
                    continue
                row: dict[str, Any] = {
                    "k": k,
                    "n": n,
                    "group_size": group_size,
                    "tokens": m,
                    "peer": peer.name,
                }
                try:
                    row |= measure_peer(peer, m, k, dense, peaks)
                    line.append(f"{m}: {row['us']:.2f}")
                except (RuntimeError, ValueError, TypeError, TritonError) as failure:
                    row["failure"] = f"{type(failure).__name__} {str(failure)[:200]}"
                    line.append(f"{m}: {row['failure'][:60]}")
                rows.append(row)
                save()
            log(f"K {k} N {n} group {group_size} {peer.name} us: " + "  ".join(line))
            del peer


def speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each cell: times by peer, speed-up of ours over cuBLAS, target, fastest other int4 kernel."""
    cells: dict[tuple[int, int, int, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "us" in row:
            cells.setdefault((row["group_size"], row["k"], row["n"], row["tokens"]), {})[row["peer"]] = row
    result = []
    for (group_size, k, n, m), peers in sorted(cells.items()):
        if Cublas.name not in peers or Ours.name not in peers:
            continue
        ours = min(
            (peers[p] for p in (Ours.name, OursDependent.name) if p in peers), key=lambda row: row["us"]
        )
        target = (TARGETS.get((k, n), {}).get(m) or LARGE.get(m)) if group_size == 128 else None
        others = {
            p: row["us"] for p, row in peers.items() if p not in (Cublas.name, Ours.name, OursDependent.name)
        }
        result.append(
            {
                "group_size": group_size, "k": k, "n": n, "tokens": m, "cublas_us": peers[Cublas.name]["us"],
                "ours_us": peers[Ours.name]["us"], "dependent_us": peers.get(OursDependent.name, ours)["us"],
                "speedup": peers[Cublas.name]["us"] / ours["us"], "target": target, "share": ours["share"],
                "cap": peers[Cublas.name]["us"] / ours["roof_us"], "error": ours["error"], "others_us": others,
                "is_fastest": all(ours["us"] <= us for us in others.values()),
            }
        )  # fmt: skip
    return result


def as_markdown(document: dict[str, Any]) -> str:
    peaks = document["peaks"]
    lines = [
        "# W4A16 products, one run",
        "",
        f"{document['gpu']}, {', '.join(f'{name} {version}' for name, version in document['versions'].items())}.",
        f"Copy bandwidth {peaks['copy_gbps']:.0f} GB/s (read and written), fp16 product {peaks['fp16_tflops']:.0f} TFLOP/s, "
        "both measured in this run. Weights rotate over more than 4 x L2; CUDA graphs; median of 5 samples.",
        "Speed-up: cuBLAS fp16 over the faster of our two launches. Roofline: largest of bytes over copy bandwidth and flop over the fp16 peak.",
        "",
        "| group | K x N | M | cuBLAS us | ours us | ours, dependent launch us | speed-up | target | roofline | at the roofline | error | fastest other |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in document["cells"]:
        target = (
            ""
            if cell["target"] is None
            else f"{cell['target']:.2f} {'met' if cell['speedup'] >= cell['target'] else 'missed'}"
        )
        others = cell["others_us"]
        best = min(others, key=others.get) if others else None
        other = (
            ""
            if best is None
            else f"{best} {others[best]:.2f}{'' if cell['is_fastest'] else ', faster than ours'}"
        )
        lines.append(
            f"| {cell['group_size']} | {cell['k']} x {cell['n']} | {cell['tokens']} | {cell['cublas_us']:.2f} | {cell['ours_us']:.2f} "
            f"| {cell['dependent_us']:.2f} | {cell['speedup']:.2f}x | {target} | {100 * cell['share']:.0f} % | {cell['cap']:.2f}x "
            f"| {cell['error']:.1e} | {other} |"
        )
    return "\n".join(lines) + "\n"


def log(message: str) -> None:
    print(f"[{time.time() - START:6.1f} s] {message}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks", help="folder of kernels.json and kernels.md"
    )
    parser.add_argument(
        "--limit-s", type=float, default=1800.0, help="start no measurement after this many seconds"
    )
    parser.add_argument(
        "--warm-s", type=float, default=300.0, help="stop waiting for compilation after this many seconds"
    )
    parser.add_argument("--skip-attention", action="store_true", help="leave out scripts/bench_attention.py")
    parser.add_argument("--render", type=Path, help="write kernels.md of this kernels.json, without a GPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        warm_worker(arguments.worker)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.render:
        document = json.loads(arguments.render.read_text())
        document["cells"] = speedups(document["rows"])
        (arguments.out / "kernels.md").write_text(as_markdown(document))
        return
    quiet_capture()
    torch.backends.cuda.matmul.allow_tf32 = False
    workers = start_warm_workers(SHAPES, TOKENS)
    table = table_of(torch.device("cuda"))
    jobs = []
    for k, n in SHAPES:
        for group_size in (128, 64) if (k, n) in GROUP_64 else (128,):
            weight = prepare(random_weight(n, k, group_size, "meta"))
            for m in TOKENS:
                tile = pick(table, m, weight, has_wgmma(torch.cuda.current_device()))
                modes = {"never", getattr(tile, "dependent", "never")}
                jobs += [(tile, mode, m, n, k, group_size) for mode in sorted(modes)]
    precompile(jobs, arguments.warm_s)
    wait_or_stop(workers, START + arguments.warm_s)
    peaks = measure_peaks()
    document = provenance(peaks.name) | {
        "gpu": peaks.name, "versions": versions(), "rows": [],
        "peaks": {"copy_gbps": peaks.copy_bytes_per_us / 1e3, "fp16_tflops": peaks.flop_per_us / 1e6, "l2_bytes": peaks.l2_bytes},
    }  # fmt: skip
    log(f"{document['gpu']} {document['peaks']} {document['versions']}")
    for group_size, shapes in ((128, SHAPES), (64, GROUP_64)):
        bench_products(
            shapes, TOKENS, group_size, peaks, arguments.limit_s, document["rows"],
            lambda: save(document, arguments.out),
        )  # fmt: skip
    save(document, arguments.out)
    cells = [cell for cell in document["cells"] if cell["target"] is not None]
    met = sum(cell["speedup"] >= cell["target"] for cell in cells)
    ratio = (
        statistics.geometric_mean([cell["speedup"] / cell["target"] for cell in cells]) if cells else math.nan
    )
    log(f"{met} of {len(cells)} targets met, mean ratio to target {ratio:.3f}")
    if (
        not arguments.skip_attention
        and (attention := Path(__file__).with_name("bench_attention.py")).is_file()
    ):
        subprocess.run([sys.executable, attention, "--out", arguments.out], check=True)


def save(document: dict[str, Any], folder: Path) -> None:
    document["cells"] = speedups(document["rows"])
    (folder / "kernels.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "kernels.md").write_text(as_markdown(document))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
