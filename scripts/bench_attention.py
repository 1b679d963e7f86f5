"""Benchmark of paged decode attention on one GPU: fp16 and int8 pages, torch's SDPA decode path beside them.

    python scripts/bench_attention.py [--tune] [--seconds 100] [--out benchmarks]

One run measures the copy bandwidth (bytes read plus written), checks every timed shape against the fp32 reference, and times
calls in CUDA graphs over pages that are rotated past the L2 cache. `bandwidth_share` counts the bytes of keys, values and their
parameters, each read once. Writes attention.json and attention.md; `--tune` first times the candidate configurations and uses
the best of each kind; its figures go to attention_tuning.json. `--seconds` bounds the run: what is left out is named.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from provenance import provenance
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kernels.attention.launch import launch_decode  # noqa: E402
from kernels.attention.operands import DecodeWorkspace  # noqa: E402
from kernels.attention.paged import decode_attention_reference, rope_decode_attention  # noqa: E402
from kernels.attention.units import CONFIGS, DecodeConfig, max_units  # noqa: E402
from kernels.block.fused import add_rms_norm, rope_store, silu_mul  # noqa: E402
from kernels.kv.pages import BLOCK_SIZE, KVCache  # noqa: E402

LAYOUTS = {"70b": (64, 8, 128), "7b": (32, 32, 128)}
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 8, 16, 32, 64)
CHAINS = list(itertools.product((512, 2048), (False, True), (False, True)))  # context, pdl, joined
START = time.monotonic()
CANDIDATES = {
    16: [
        DecodeConfig(64, 4, 4, 1),
        DecodeConfig(64, 4, 4, 2),
        DecodeConfig(64, 4, 3, 2),
        DecodeConfig(64, 4, 6, 1),
        DecodeConfig(64, 8, 3, 2),
    ],
    8: [
        DecodeConfig(64, 2, 3, 4),
        DecodeConfig(64, 2, 4, 4),
        DecodeConfig(64, 2, 3, 3),
        DecodeConfig(64, 4, 3, 4),
        DecodeConfig(64, 4, 3, 3),
        DecodeConfig(64, 2, 3, 4, min_per_sm=2),
        DecodeConfig(64, 2, 3, 4, min_per_sm=2, max_fused_units=4),
        DecodeConfig(64, 2, 3, 4, min_per_sm=2, max_fused_units=8),
        DecodeConfig(64, 4, 3, 4, min_per_sm=2, max_fused_units=4),
        DecodeConfig(64, 4, 3, 2),
        DecodeConfig(64, 4, 4, 2, max_fused_units=4),
    ],
}
TUNED_SHAPES = [
    (layout, batch, context)
    for layout in LAYOUTS
    for batch, context in ((1, 512), (1, 2048), (8, 512), (8, 4096), (16, 4096), (32, 4096))
]


def log(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


@dataclass
class Pool:
    """Pages of one layout and kv kind, more than the largest shape needs, filled with random tokens."""

    layout: str
    bits: int
    cache: KVCache
    order: Tensor  # (num_blocks,) int32, a random order of the pages

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of context costs a layer."""
        values = 2 * self.cache.head_dim * (2 if self.bits == 16 else 1) + (8 if self.bits == 8 else 0)
        return values * self.cache.num_kv_heads

    def tables(self, batch: int, context: int) -> list[Tensor]:
        """Block tables (batch, context / P) of pages far enough apart that repeated use misses a 4-fold L2 cache."""
        pages = batch * context // BLOCK_SIZE
        wanted = math.ceil(4 * l2_bytes() / (pages * BLOCK_SIZE * self.token_bytes)) + 1
        copies = max(1, min(wanted, self.order.numel() // pages, 64))
        return [self.order[i * pages : (i + 1) * pages].view(batch, -1).contiguous() for i in range(copies)]


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def make_pool(layout: str, bits: int, tokens: int) -> Pool:
    """Pages for `tokens` tokens: normal keys and values at 16 bits, uniform codes with a scale near 4 / 255 at 8."""
    _, heads, head_dim = LAYOUTS[layout]
    blocks = tokens // BLOCK_SIZE
    shape = (blocks, heads, BLOCK_SIZE)
    if bits == 16:
        k, v = (torch.empty(*shape, head_dim, dtype=torch.float16, device="cuda") for _ in range(2))
        for part in (k, v):
            for chunk in part.split(max(1, (1 << 27) // (heads * BLOCK_SIZE * head_dim))):
                chunk.normal_()
        cache = KVCache(k, v, None, None, 16)
    else:
        k, v = (torch.empty(*shape, head_dim // 2, dtype=torch.int16, device="cuda") for _ in range(2))
        for part in (k, v):
            for chunk in part.split(max(1, (1 << 27) // (heads * BLOCK_SIZE * head_dim))):
                chunk.random_(-32768, 32768)
        params = torch.empty(blocks, heads, 2, BLOCK_SIZE, 2, dtype=torch.float16, device="cuda")
        params[..., 0].uniform_(0.012, 0.02)
        params[..., 1].normal_(0, 0.1)
        cache = KVCache(k, v, params, None, 8)
    return Pool(layout, bits, cache, torch.randperm(blocks, device="cuda").int())


def event_us(run: Callable[[], object]) -> float:
    """Microseconds on the device between two events around `run`."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def time_us(call: Callable[[int], object], copies: int, expected_us: float) -> tuple[float, float]:
    """Median microseconds of a call and the spread between replays (largest minus smallest over the median).

    call(i) uses copy i of the data; a graph holds enough calls to last about a millisecond.
    """
    calls = copies * max(1, math.ceil(min(1500.0, 24 * expected_us) / (expected_us * copies)))
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(
        torch.cuda.Stream()
    ):  # torch.cuda.graph would collect garbage and empty caches each time
        graph.capture_begin()
        for i in range(calls):
            call(i % copies)
        graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    samples = [event_us(graph.replay) / calls for _ in range(7)]
    middle = statistics.median(samples)
    return middle, (max(samples) - min(samples)) / middle


def copy_bandwidth() -> float:
    """Bytes a microsecond, read plus written, of the best of ten 1 GiB copies on the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / min(event_us(lambda: target.copy_(source)) for _ in range(10))


def workspace(batch: int, layout: str) -> DecodeWorkspace:
    num_heads, heads, head_dim = LAYOUTS[layout]
    units = (
        max_units(batch, heads, "cuda") + 4096 // heads
    )  # candidates may have more than the tuned configurations
    return DecodeWorkspace(
        torch.empty(units, num_heads, head_dim, device="cuda"),
        torch.empty(units, num_heads, device="cuda"),
        torch.zeros(batch * heads, dtype=torch.int32, device="cuda"),
    )


def decode_call(
    pool: Pool, batch: int, context: int, config: DecodeConfig | None, pdl: bool = False
) -> tuple[Callable[[int], Tensor], int, float]:
    """(call, copies, relative error of the call on copy 0 against fp32)."""
    num_heads, _, head_dim = LAYOUTS[pool.layout]
    tables = pool.tables(batch, context)
    q = torch.randn(batch, num_heads, head_dim, dtype=torch.float16, device="cuda")
    out, scratch = torch.empty_like(q), workspace(batch, pool.layout)
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    scale = head_dim**-0.5

    def call(i: int) -> Tensor:
        return launch_decode(
            q, pool.cache, tables[i], lens, scale, None, scratch, out, config=config, pdl=pdl
        )

    rows = min(batch, 2 if context > 8192 else 4)  # the reference is slow: some sequences of the batch
    out.fill_(float("nan"))
    first = call(0).clone()
    expected = decode_attention_reference(q[:rows], pool.cache, tables[0][:rows], lens[:rows], scale)
    error = float((first[:rows].float() - expected.float()).norm() / expected.float().norm())
    if not torch.isfinite(first).all() or not torch.equal(first, call(0)):
        error = math.inf
    return call, len(tables), error


def sdpa_rows(pool: Pool, batch: int, context: int, expected_us: float) -> dict[str, float]:
    """Microseconds of torch's scaled_dot_product_attention on contiguous fp16 keys and values, by backend."""
    num_heads, heads, head_dim = LAYOUTS[pool.layout]
    per_copy = batch * heads * context * head_dim
    copies = max(1, min(pool.cache.k.numel() // per_copy, math.ceil(4 * l2_bytes() / (4 * per_copy)) + 1))
    flat = [part.view(-1) for part in (pool.cache.k, pool.cache.v)]
    pairs = [
        [part[i * per_copy : (i + 1) * per_copy].view(batch, heads, context, head_dim) for part in flat]
        for i in range(copies)
    ]
    q = torch.randn(batch, num_heads, 1, head_dim, dtype=torch.float16, device="cuda")
    times: dict[str, float] = {}
    for name, backend in (
        ("default", None),
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        try:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                times[name] = time_us(
                    lambda i: F.scaled_dot_product_attention(
                        q, pairs[i][0], pairs[i][1], enable_gqa=num_heads != heads
                    ),
                    copies,
                    expected_us * 2,
                )[0]
        except RuntimeError as error:  # this backend does not take the shape
            log(f"sdpa {name} {pool.layout} {batch}x{context}: {str(error).splitlines()[0][:90]}")
    return times


def layer_chain(pool: Pool, context: int, pdl: bool, is_joined: bool) -> float:
    """Microseconds a layer of what stands between the products at batch 1: two norms, RoPE and store, attention, SiLU.

    is_joined: RoPE, store and attention are one kernel.
    """
    num_heads, heads, head_dim = LAYOUTS[pool.layout]
    width, inner = num_heads * head_dim, 11008 if pool.layout == "7b" else 28672
    tables = pool.tables(1, context)
    x, delta, weight = (torch.randn(1, width, dtype=torch.float16, device="cuda") for _ in range(3))
    qkv = torch.randn(1, (num_heads + 2 * heads) * head_dim, dtype=torch.float16, device="cuda")
    gate_up = torch.randn(1, 2 * inner, dtype=torch.float16, device="cuda")
    angles = torch.rand(1, head_dim // 2, device="cuda")
    lens = torch.tensor([context], dtype=torch.int32, device="cuda")
    scratch = workspace(1, pool.layout)
    slots = [t[0, -1:].long() * BLOCK_SIZE + BLOCK_SIZE - 1 for t in tables]

    def layer(i: int) -> None:
        add_rms_norm(x, delta, weight[0], 1e-5, pdl=pdl)
        if is_joined:
            rope_decode_attention(
                qkv, angles, angles, pool.cache, tables[i], lens, 0.1, workspace=scratch, pdl=pdl
            )
        else:
            q = rope_store(qkv, angles, angles, pool.cache, slots[i], pdl=pdl)
            launch_decode(q, pool.cache, tables[i], lens, 0.1, None, scratch, None, pdl=pdl)
        add_rms_norm(x, delta, weight[0], 1e-5, pdl=pdl)
        silu_mul(gate_up, pdl=pdl)

    return time_us(layer, len(tables), 12.0)[0]


def compile_job(jobs: list[list[Any]]) -> None:
    """In a process of its own: compile into Triton's disk cache what decode_call or layer_chain needs, by running it once."""
    for kind, layout, bits, batch, context, config, *flags in jobs:
        pool = make_pool(layout, bits, max(batch * context, 4096))
        if kind == "decode":
            decode_call(pool, batch, context, DecodeConfig(*config), *flags)
        else:
            CONFIGS[bits, LAYOUTS[layout][0] > LAYOUTS[layout][1]] = DecodeConfig(*config)
            layer_chain(pool, context, *flags)


def precompile(jobs: list[list[Any]]) -> None:
    workers = max(1, min(len(jobs), (os.cpu_count() or 2) - 2))
    processes = [
        subprocess.Popen([sys.executable, __file__, "--compile", json.dumps(jobs[i::workers])], stderr=subprocess.PIPE)
        for i in range(workers)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate()
        if process.returncode:
            log("a compiling process failed: " + errors.decode()[-300:])
    log(f"compiled {len(jobs)} binaries in {workers} processes")


def final_jobs(layout: str) -> list[list[Any]]:
    """Compile jobs for all that is measured with the chosen configurations of a layout."""
    jobs: list[list[Any]] = []
    for bits in (16, 8):
        chosen = list(asdict(CONFIGS[bits, LAYOUTS[layout][0] > LAYOUTS[layout][1]]).values())
        for batch, pdl in itertools.product((1, 8, 32), (False, True)):
            jobs.append(["decode", layout, bits, batch, 512, chosen, pdl])
        for context, *flags in CHAINS:
            jobs.append(["chain", layout, bits, 1, context, chosen, *flags])
    return jobs


def tune(pools: dict[int, Pool], layout: str, bandwidth: float, rows: list[dict[str, Any]]) -> None:
    """Set CONFIGS of this layout to the best candidate of each kind."""
    shared = LAYOUTS[layout][0] > LAYOUTS[layout][1]
    for bits, pool in pools.items():
        CONFIGS[bits, shared] = fastest(pool, CANDIDATES[bits], bandwidth, rows)
        log(f"{layout} {bits} bits: {CONFIGS[bits, shared]}")


def fastest(
    pool: Pool, configs: list[DecodeConfig], bandwidth: float, rows: list[dict[str, Any]]
) -> DecodeConfig:
    """The configuration with the least geometric mean of its times over the best ones, over the shapes of the layout."""
    behind = dict.fromkeys(configs, 0.0)
    for batch, context in [(b, c) for name, b, c in TUNED_SHAPES if name == pool.layout]:
        times: dict[DecodeConfig, float] = {}
        floor = batch * context * pool.token_bytes / bandwidth
        for config in configs:
            call, copies, error = decode_call(pool, batch, context, config)
            us, spread = time_us(call, copies, floor + 4)
            rows.append(
                {
                    "layout": pool.layout, "batch": batch, "context": context, "kv_bits": pool.bits, **asdict(config),
                    "us": us, "spread": spread, "bandwidth_share": floor / us, "rel_error": error,
                }
            )  # fmt: skip
            if error < 2e-3:
                times[config] = us
        if not times:
            raise SystemExit(f"no configuration is right at {pool.layout}, {pool.bits} bits: {rows[-1]}")
        for config in configs:
            behind[config] += math.log(times.get(config, 100 * min(times.values())) / min(times.values()))
    return min(behind, key=lambda config: behind[config])


def table(rows: list[dict[str, Any]], header: str) -> str:
    """Markdown, one line a shape: ours at both widths, the same under programmatic launch, and SDPA."""
    lines = [
        header, "",
        "| layout | context | batch | fp16 us | share | int8 us | share | int8 / fp16 | fp16, pdl | int8, pdl | ratio | SDPA us |",
        "| " + "--- | " * 12,
    ]  # fmt: skip
    for shape in dict.fromkeys((r["layout"], r["context"], r["batch"]) for r in rows):
        here = {(r["kv"], r["impl"]): r for r in rows if (r["layout"], r["context"], r["batch"]) == shape}
        half, code = here["fp16", "ours"], here["int8", "ours"]
        half_pdl, code_pdl = here["fp16", "ours, pdl"], here["int8", "ours, pdl"]
        sdpa = min((r["us"] for (_, impl), r in here.items() if impl.startswith("sdpa")), default=math.nan)
        lines.append(
            "| {} | {} | {} | {:.1f} | {:.0%} | {:.1f} | {:.0%} | {:.2f} | {:.1f} | {:.1f} | {:.2f} | {:.1f} |".format(
                *shape, half["us"], half["bandwidth_share"], code["us"], code["bandwidth_share"], code["speedup_vs_fp16"],
                half_pdl["us"], code_pdl["us"], code_pdl["speedup_vs_fp16"], sdpa,
            )
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> None:
    bandwidth = copy_bandwidth()
    device = torch.cuda.get_device_name(0)
    log(f"{device}, copy {bandwidth / 1e6:.2f} TB/s, torch {torch.__version__}, triton {triton.__version__}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    chain: list[dict[str, Any]] = []
    tuning: list[dict[str, Any]] = []

    def save() -> None:
        head = provenance(device, triton=triton.__version__, cuda=str(torch.version.cuda)) | {
            "copy_tb_per_s": bandwidth / 1e6, "configs": {f"{b} bits, shared {s}": asdict(c) for (b, s), c in CONFIGS.items()},
        }  # fmt: skip
        (args.out / "attention.json").write_text(
            json.dumps({**head, "rows": rows, "layer_chain": chain}, indent=1)
        )
        if tuning:
            (args.out / "attention_tuning.json").write_text(json.dumps({**head, "rows": tuning}, indent=1))
        note = (
            f"Decode attention on {device}: microseconds a call, share of the copy bandwidth measured in the same run "
            f"({bandwidth / 1e6:.2f} TB/s), int8 over fp16, and the fastest backend of torch's SDPA on contiguous fp16. "
            f"Pages of {BLOCK_SIZE} tokens, rotated past L2, CUDA graphs. Written by `scripts/bench_attention.py`."
        )
        (args.out / "attention.md").write_text(table(rows, note))

    if args.tune:
        jobs = [
            ["decode", layout, bits, batch, 512, list(asdict(c).values())]
            for layout, batch, bits in itertools.product(LAYOUTS, (1, 8, 32), CANDIDATES)
            for c in CANDIDATES[bits]
        ]  # fmt: skip
        precompile(jobs + [job for layout in LAYOUTS for job in final_jobs(layout)])
    for layout in LAYOUTS:
        memory = torch.cuda.mem_get_info()[0] * 0.85
        largest = max(BATCHES) * max(CONTEXTS)
        heads = LAYOUTS[layout][1]
        tokens = min(largest, int(memory / (heads * 128 * 6)) // BLOCK_SIZE * BLOCK_SIZE)
        pools = {bits: make_pool(layout, bits, tokens) for bits in (16, 8)}
        log(f"{layout}: pools of {tokens} tokens")
        before = dict(CONFIGS)
        if args.tune:
            tune(pools, layout, bandwidth, tuning)
            save()
        if before != CONFIGS or not args.tune:
            precompile(final_jobs(layout))
        for context in args.contexts:
            for batch in args.batches:
                if batch * context > tokens:
                    log(f"left out: {layout} {batch} x {context}, memory")
                    continue
                if time.monotonic() - START > args.seconds:
                    log(f"left out: {layout} {batch} x {context}, time")
                    continue
                half: dict[str, float] = {}
                for (bits, kv), impl in itertools.product(((16, "fp16"), (8, "int8")), ("ours", "ours, pdl")):
                    floor = batch * context * pools[bits].token_bytes / bandwidth
                    call, copies, error = decode_call(pools[bits], batch, context, None, impl != "ours")
                    us, spread = time_us(call, copies, floor + 4)
                    half.setdefault(impl, us)
                    rows.append(
                        {
                            "layout": layout, "batch": batch, "context": context, "kv": kv, "impl": impl, "us": us,
                            "speedup_vs_fp16": half[impl] / us, "bandwidth_share": floor / us, "rel_error": error, "spread": spread,
                        }
                    )  # fmt: skip
                floor = batch * context * pools[16].token_bytes / bandwidth
                for name, us in sdpa_rows(pools[16], batch, context, floor + 4).items():
                    rows.append(
                        {
                            "layout": layout, "batch": batch, "context": context, "kv": "fp16", "impl": f"sdpa {name}", "us": us,
                            "speedup_vs_fp16": half["ours"] / us, "bandwidth_share": floor / us, "rel_error": None, "spread": None,
                        }
                    )  # fmt: skip
            save()
        for bits, pool in pools.items():
            for context in (64, 128, 512, 2048):
                call, copies, _ = decode_call(pool, 1, context, None)
                us = time_us(call, copies, 8.0)[0]
                chain.append(
                    {"layout": layout, "kv_bits": bits, "context": context, "attention_alone": True, "us": us}
                )
                log(f"latency {chain[-1]}")
            for context, pdl, is_joined in CHAINS:
                if time.monotonic() - START > args.seconds:
                    log(f"left out: layer chain {layout} {bits} bits {context}, time")
                    continue
                us = layer_chain(pool, context, pdl, is_joined)
                chain.append(
                    {
                        "layout": layout,
                        "kv_bits": bits,
                        "context": context,
                        "pdl": pdl,
                        "joined": is_joined,
                        "us": us,
                    }
                )
                log(f"layer chain {chain[-1]}")
        save()
        del pools, pool
        torch.cuda.empty_cache()
    save()
    print((args.out / "attention.md").read_text())
    wrong = [r for r in rows if not r["impl"].startswith("sdpa") and not r["rel_error"] < 2e-3]
    if wrong:
        raise SystemExit(f"{len(wrong)} rows are wrong or not repeatable: {wrong[:3]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of paged decode attention on one GPU.")
    parser.add_argument("--tune", action="store_true", help="time the candidate configurations first")
    parser.add_argument("--seconds", type=float, default=300.0, help="start no new shape after this long")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens of a sequence")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="sequences")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the results")
    parser.add_argument("--compile", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.compile is not None:
        compile_job(args.compile)
    else:
        run(args)


if __name__ == "__main__":
    main()
