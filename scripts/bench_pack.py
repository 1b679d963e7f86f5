"""Seconds that `quantize pack` takes for a 7B shape, beside what the disk alone takes for as many bytes in the same run.

    python scripts/bench_pack.py [--shape 7b] [--work FOLDER] [--out benchmarks]

Makes an int4 AWQ checkpoint of random words in the shape of Llama 2 7B, writes as many bytes plainly with one fsync at the end,
packs the checkpoint in a process of its own (its CPU seconds and peak memory are that process's), and plainly writes once more.
The source was written just before, so that most of it is read from the page cache. Everything is removed at the end.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from provenance import provenance  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny_checkpoints import document, shapes  # noqa: E402
from torch import Tensor  # noqa: E402

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "tiny": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000},
}
GROUP_SIZE = 128
CHUNK = 2**24  # bytes of one write


def write_packed_source(folder: Path, sizes: dict[str, int]) -> int:
    """An AWQ checkpoint of random words, one shard a block; returns its bytes."""
    raw = document("llama", "float16", dict(sizes))
    table, random, layers = shapes("llama", raw), np.random.default_rng(0), sizes["num_hidden_layers"]
    folder.mkdir(parents=True)
    size = 0
    for block in range(layers + 1):
        inside = f".layers.{block}."
        names = [n for n in table if (inside in n if block < layers else ".layers." not in n)]
        tensors = dict(pair for name in names for pair in random_tensors(name, table[name], random))
        save_file(tensors, folder / f"model-{block + 1:05d}-of-{layers + 1:05d}.safetensors")
        size += sum(tensor.nbytes for tensor in tensors.values())
    quantization = {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True}
    quantization |= {"group_size": GROUP_SIZE}
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))
    return size


def random_tensors(
    name: str, shape: tuple[int, ...], random: np.random.Generator
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that hold the weight `name` of (N, K): random words for a linear of a block, small floats for all others."""
    if "_proj." not in name:
        yield name, torch.from_numpy(random.random(shape, dtype=np.float32)).half()
        return
    module, (rows, cols) = name.removesuffix(".weight"), shape
    for part, height in (("qweight", cols), ("qzeros", cols // GROUP_SIZE)):
        words = np.frombuffer(bytearray(random.bytes(height * rows // 2)), dtype=np.int32)
        yield f"{module}.{part}", torch.from_numpy(words).view(height, rows // 8)
    spread = 6.5 * cols**0.5  # 6.5: of a code less a zero point; activations keep their size
    scales = (random.random((cols // GROUP_SIZE, rows), dtype=np.float32) + 0.5) / spread
    yield f"{module}.scales", torch.from_numpy(scales).half()


def plain_write(path: Path, size: int) -> float:
    """Seconds for one stream of writes and an fsync."""
    chunk = os.urandom(CHUNK)
    begin = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(-(-size // CHUNK)):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    path.unlink()
    return seconds


def pack(source: Path, workspace: Path, workers: int | None, result: Path) -> None:
    """What `quantize pack` does after it has read its arguments; figures go to `result`."""
    from convert.readers import open_checkpoint
    from convert.turbomind.writer import write_workspace

    begin, cpu = time.perf_counter(), time.process_time()
    packed = write_workspace(open_checkpoint(source), workspace, workers=workers)
    figures = {
        "files": packed.files,
        "weight_bytes": packed.weight_bytes,
        "seconds": time.perf_counter() - begin,
        "cpu_s": time.process_time() - cpu,
        "peak_gib": peak_gib(),
    }
    result.write_text(json.dumps(figures))


def peak_gib() -> float:
    """Largest memory of this process; `getrusage` would count its parent's too."""
    (line,) = (
        text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM:")
    )
    return int(line.split()[1]) / 2**20


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    sizes = dict(SHAPES[args.shape])
    if args.blocks:
        sizes["num_hidden_layers"] = args.blocks
    begin = time.perf_counter()
    source_bytes = write_packed_source(work / "awq", sizes)
    print(f"source of {source_bytes / 1e9:.2f} GB made in {time.perf_counter() - begin:.1f} s", flush=True)
    os.sync()
    disk = [plain_write(work / "plain", source_bytes)]
    job = (work / "awq", work / "workspace", args.workers, work / "result.json")
    child = multiprocessing.get_context("spawn").Process(target=pack, args=job)
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"packing ended with {child.exitcode}")
    figures = json.loads((work / "result.json").read_text())
    disk.append(plain_write(work / "plain", source_bytes))
    rate, disk_rate = figures["weight_bytes"] / figures["seconds"], source_bytes / min(disk)
    row = {
        "shape": args.shape,
        "blocks": sizes["num_hidden_layers"],
        "weights": "int4",
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }
    return row | {
        **figures,
        "cpu_s_per_gb": figures["cpu_s"] / figures["weight_bytes"] * 1e9,
        "bytes_per_s": rate,
        "disk_seconds": disk,
        "disk_bytes_per_s": disk_rate,
        "disk_share": rate / disk_rate,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Packing speed",
        "",
        "`quantize pack` of an int4 checkpoint of random words to a TurboMind workspace, and one plain write of as many bytes with an",
        "fsync at its end (the better of one before and one after), on the same disk in the same run. The source is in the page cache.",
        "",
        "| shape | blocks | GB | cores | load | seconds | plain write, s | share of the disk | CPU s a GB | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['shape']} | {row['blocks']} | {row['weight_bytes'] / 1e9:.2f} | {row['cpus']} | {row['load']:.1f} "
            f"| {row['seconds']:.1f} | {min(row['disk_seconds']):.1f} | {row['disk_share']:.0%} | {row['cpu_s_per_gb']:.1f} "
            f"| {row['peak_gib']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--workers", type=int, help="threads; left out, the program's own choice")
    parser.add_argument(
        "--work", type=Path, help="folder for the models, on the disk to be measured; the system's by default"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="pack-", dir=args.work))
    try:
        rows = [measure(args, work)]
    finally:
        shutil.rmtree(work)
    args.out.mkdir(parents=True, exist_ok=True)
    document = provenance(f"CPU, {rows[0]['cpus']} cores") | {"rows": rows}
    (args.out / "pack.json").write_text(json.dumps(document, indent=1) + "\n")
    (args.out / "pack.md").write_text(table(rows))
    print(table(rows), json.dumps(rows[0]))


if __name__ == "__main__":
    main()
