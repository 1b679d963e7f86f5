"""Speed of the experts of a layer: ours in int4 and in floats beside peers, the same codes, one run; also finds the tiles.

usage: python scripts/bench_experts.py [--tune] [--shapes qwen3-30b mixtral] [--tokens 1 4 ...] [--limit-s 400] [--out DIR]
Writes experts.json and experts.md (and tiles.json with --tune) to DIR, by default benchmarks/. What is timed is gate, up, SiLU,
down and the weighted sum, without the router. A CUDA graph holds many calls; each call has another choice of experts, so that
weights come from memory as in a model of many layers. Every result is compared with a float32 reference before it is timed.
A peer that cannot be imported is left out by name: humming (its MoE layer), vllm (`--vllm FILE`: fused_moe.py of that package).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from kernel_timing import Peaks, measure_peaks, quiet_capture, time_graph, wait_or_stop  # noqa: E402
from provenance import provenance  # noqa: E402
from torch import Tensor  # noqa: E402

from kernels.int4 import Quantized  # noqa: E402
from kernels.moe.few import MAX_PAIRS, FewTile, launch_few  # noqa: E402
from kernels.moe.many import ManyTile, launch_many  # noqa: E402
from kernels.moe.product import Entry, Tile, moe_mlp, moe_reference, run_tiles  # noqa: E402
from kernels.moe.sorting import sort_pairs  # noqa: E402
from kernels.moe.weights import ExpertWeights, stack  # noqa: E402
from kernels.w4a16.layout import W4Weight, pair, prepare, restore  # noqa: E402

SHAPES = {  # experts, experts of a token, hidden size, intermediate size of an expert
    "qwen3-30b": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CHOICES = 16  # different inputs in turn
TOLERANCE = 3e-3


@dataclass(frozen=True)
class Case:
    """Inputs of one shape and number of tokens, CHOICES of each: x (T, H), chosen (T, k), weights (T, k)."""

    shape: str
    tokens: int
    inputs: list[tuple[Tensor, Tensor, Tensor]]

    @property
    def pairs(self) -> int:
        return self.tokens * SHAPES[self.shape][1]


def make_case(shape: str, tokens: int) -> Case:
    count, topk, hidden, _ = SHAPES[shape]
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    inputs = []
    for _ in range(CHOICES):
        x = (torch.randn(tokens, hidden, device="cuda", generator=generator) * 0.1).half()
        weights, chosen = torch.rand(tokens, count, device="cuda", generator=generator).topk(topk, dim=1)
        inputs.append((x, chosen, weights / weights.sum(1, keepdim=True)))
    return Case(shape, tokens, inputs)


def quantized_experts(shape: str) -> tuple[list[Quantized], list[Quantized], list[Quantized]]:
    """Random gate, up and down of every expert, groups of 128."""
    count, _, hidden, inner = SHAPES[shape]
    generator = torch.Generator(device="cuda").manual_seed(5)

    def one(rows: int, cols: int) -> Quantized:
        codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, device="cuda", generator=generator)
        zeros = torch.randint(
            4, 12, (rows, cols // 128), dtype=torch.uint8, device="cuda", generator=generator
        )
        scales = (torch.rand(rows, cols // 128, device="cuda", generator=generator) * 0.01 + 0.002).half()
        return Quantized(codes, scales, zeros, 128)

    sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
    gate, up, down = ([one(*size) for _ in range(count)] for size in sizes)
    return gate, up, down


def int4_operands(parts: tuple[list[Quantized], ...]) -> tuple[ExpertWeights, ExpertWeights]:
    gate, up, down = parts
    paired = [pair(prepare(g), prepare(u)) for g, u in zip(gate, up, strict=True)]
    return stack(paired), stack([prepare(d) for d in down])


def float_operands(weights: tuple[ExpertWeights, ExpertWeights]) -> tuple[ExpertWeights, ExpertWeights]:
    """The same weights in fp16."""
    both = []
    for weight in weights:
        floats = []
        for expert in range(weight.experts):
            one = weight.of_expert(expert)
            assert isinstance(one, W4Weight)
            floats.append(restore(one).dequantize(torch.float16))
        both.append(ExpertWeights(torch.stack(floats), None, weight.in_features, 0, weight.is_paired))
    return both[0], both[1]


def few_tiles() -> Iterator[FewTile]:
    for bn, warps in ((32, 1), (32, 2), (64, 2), (64, 4), (128, 4)):
        for stages, eighths in itertools.product((3, 5), (1, 2)):
            yield FewTile(bn, warps, stages, eighths)
    for bn, warps, stages in ((16, 1, 5), (16, 1, 8), (32, 1, 8), (64, 2, 8), (64, 4, 8)):
        yield FewTile(bn, warps, stages)
    for bn, warps in ((64, 4), (128, 4)):
        yield FewTile(bn, warps, 3, 4)


def many_tiles() -> Iterator[ManyTile]:
    for bm, bn, warps, stages in (
        (16, 64, 4, 4), (16, 128, 4, 4), (16, 128, 8, 3), (32, 64, 4, 4), (32, 128, 4, 3), (32, 128, 4, 4),
        (64, 64, 4, 3), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 8, 3), (128, 64, 4, 3), (128, 128, 4, 3),
        (128, 128, 8, 3), (128, 128, 8, 4), (256, 64, 4, 3), (256, 128, 8, 3), (128, 256, 8, 3),
    ):  # fmt: skip
        yield ManyTile(bm, bn, warps, stages)


def candidates(pairs: int, count: int) -> list[Tile]:
    """Tiles worth a try for so many pairs."""
    tiles: list[Tile] = list(few_tiles()) if pairs <= MAX_PAIRS else []
    if pairs > 64:
        average = pairs / count
        tiles += [tile for tile in many_tiles() if tile.bm <= max(32, 4 * average)]
    return tiles


def product(weight: ExpertWeights, case: Case, tile: Tile, rows: list[Tensor]) -> Callable[[int], None]:
    """One of the two products alone, sorting included where it is needed."""
    topk = SHAPES[case.shape][1] if weight.is_paired else 1
    out = torch.empty(case.pairs, weight.out_features, dtype=torch.float16, device="cuda")

    def call(i: int) -> None:
        _, chosen, factors = case.inputs[i]
        factor = None if weight.is_paired else factors.reshape(-1)
        if isinstance(tile, FewTile):
            launch_few(rows[i], chosen.reshape(-1).int(), weight, tile, out, topk, factor)
        else:
            pairs = sort_pairs(chosen, weight.experts, tile.bm)
            launch_many(rows[i], pairs, weight, tile, out, topk, factor)

    return call


def tune(weights: tuple[ExpertWeights, ExpertWeights], case: Case, until: float) -> dict[str, Any]:
    """The fastest tile of each product for this case, and its time."""
    count, _, hidden, size = SHAPES[case.shape]
    found: dict[str, Any] = {"experts": count, "hidden": hidden, "inner": size, "pairs": case.pairs}
    inner = [
        torch.randn(case.pairs, weights[0].out_features, device="cuda").half() * 0.1 for _ in range(CHOICES)
    ]
    for name, weight, rows in (
        ("gate_up", weights[0], [x for x, _, _ in case.inputs]),
        ("down", weights[1], inner),
    ):
        best: tuple[float, Tile] | None = None
        for tile in candidates(case.pairs, weight.experts):
            if time.time() > until and best is not None:
                break
            try:
                us = time_graph(product(weight, case, tile, rows), CHOICES, 50.0, 3).us
            except Exception as error:
                print(f"{case.shape} {case.tokens} {name} {tile}: {type(error).__name__}", file=sys.stderr)
                torch.cuda.synchronize()
                continue
            if best is None or us < best[0]:
                best = (us, tile)
        assert best is not None
        kernel = "few" if isinstance(best[1], FewTile) else "many"
        found[name] = {"kernel": kernel, **asdict(best[1])}
        found[name + "_us"] = round(best[0], 2)
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def entry_of(found: dict[str, Any]) -> Entry:
    from kernels.moe.product import parse_entries

    return parse_entries([found])[0]


def roof_us(case: Case, weight_bytes: float, peaks: Peaks) -> float:
    """Time of reading the chosen experts' weights once (mean of the choices), or of the arithmetic."""
    count, _, hidden, inner = SHAPES[case.shape]
    used = sum(len(chosen.unique()) for _, chosen, _ in case.inputs) / len(case.inputs)
    return peaks.roof_us(weight_bytes * used / count, 2 * 3 * hidden * inner * case.pairs)


def check(call: Callable[[int], Tensor], reference: list[Tensor]) -> float:
    """Relative error of the first results; raises where one is off. Every input is run once, so that none is new in a graph."""
    for i in range(CHOICES):
        call(i)
    worst = 0.0
    for i, expected in enumerate(reference):
        out = call(i)
        worst = max(worst, float((out.float() - expected.float()).norm() / expected.float().norm()))
    if not worst < TOLERANCE * 3:
        raise ValueError(f"relative error {worst:.4f}")
    return worst


def bench(shape: str, options: argparse.Namespace, peaks: Peaks, until: float) -> tuple[list[Any], list[Any]]:
    from expert_peers import peers_of

    parts = quantized_experts(shape)
    weights = int4_operands(parts)
    floats = float_operands(weights)
    peers = peers_of(parts, options.vllm)
    del parts
    rows, tiles = [], []
    for tokens in options.tokens:
        case = make_case(shape, tokens)
        entry = None
        if options.tune:
            tiles.append(tune(weights, case, until))
            entry = entry_of(tiles[-1])
        ours = lambda i, c=case, e=entry: (  # noqa: E731
            moe_mlp(*c.inputs[i], *weights) if e is None else run_tiles(*c.inputs[i], *weights, e)
        )
        half = lambda i, c=case, e=entry: (  # noqa: E731
            moe_mlp(*c.inputs[i], *floats) if e is None else run_tiles(*c.inputs[i], *floats, e)
        )
        contenders = {"ours": ours, "ours fp16": half} | {
            name: (lambda i, c=case, p=peer: p(*c.inputs[i])) for name, peer in peers.items()
        }
        reference = [moe_reference(*case.inputs[i], *weights) for i in range(2)]
        bytes_of = {"ours fp16": sum(w.size_bytes for w in floats)}
        for name, call in contenders.items():
            try:
                error = check(call, reference)
                timing = time_graph(call, CHOICES, 60.0)
            except Exception as fault:
                print(f"{shape} {tokens} {name}: {type(fault).__name__}: {str(fault)[:300]}", file=sys.stderr)
                torch.cuda.synchronize()
                continue
            roof = roof_us(case, bytes_of.get(name, sum(w.size_bytes for w in weights)), peaks)
            rows.append({
                "shape": shape, "tokens": tokens, "impl": name, "us": round(timing.us, 2), "spread": round(timing.spread, 3),
                "roofline_share": round(roof / timing.us, 3), "rel_error": round(error, 5),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
        if time.time() > until:
            print(f"{shape}: stopped after {tokens} tokens, the time is over", file=sys.stderr)
            break
    return rows, tiles


def compile_share(share: int, shares: int, shapes: list[str]) -> None:
    """Compile every `shares`-th candidate, for the cache that all processes share."""
    jobs = [
        (shape, tokens, tile)
        for shape in shapes
        for tokens in (1, 16, 64, 4096)
        for tile in candidates(tokens * SHAPES[shape][1], SHAPES[shape][0])
    ]
    done: set[str] = set()
    weights: dict[str, tuple[ExpertWeights, ExpertWeights]] = {}
    for shape, tokens, tile in jobs[share::shares]:
        if shape not in weights:
            count, _, hidden, _ = SHAPES[shape]
            words = torch.zeros(count, hidden // 128, 256, 32, dtype=torch.int16, device="cuda")
            params = torch.zeros(count, hidden // 128, 256, dtype=torch.int32, device="cuda")
            weights[shape] = (
                ExpertWeights(words, params, hidden, 128, True), ExpertWeights(words, params, hidden, 128)
            )  # fmt: skip
        case = Case(shape, tokens, make_case(shape, tokens).inputs[:1])
        key = (
            f"{tile}{tokens if isinstance(tile, FewTile) else ''}{shape if isinstance(tile, FewTile) else ''}"
        )
        if key in done:
            continue
        done.add(key)
        for weight in weights[shape]:
            rows = torch.zeros(case.pairs, weight.in_features, dtype=torch.float16, device="cuda")
            try:
                product(weight, case, tile, [rows])(0)
            except Exception as error:
                print(f"{tile}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)


def markdown(document: dict[str, Any]) -> str:
    """A table for each shape: microseconds by tokens, one column an implementation."""
    lines = [
        "# Experts of a layer", "",
        f"{document['device']}, commit {document['commit'][:10]}, {document['date']}; microseconds of gate, up, SiLU, down and the weighted sum, groups of 128,",
        "in brackets the share of the roofline (chosen weights read once, or the arithmetic). Written by `scripts/bench_experts.py`.", "",
    ]  # fmt: skip
    for shape in dict.fromkeys(row["shape"] for row in document["rows"]):
        chosen = [row for row in document["rows"] if row["shape"] == shape]
        names = list(dict.fromkeys(row["impl"] for row in chosen))
        lines += [
            f"## {shape}",
            "",
            "| tokens | " + " | ".join(names) + " |",
            "| --- " * (len(names) + 1) + "|",
        ]
        for tokens in dict.fromkeys(row["tokens"] for row in chosen):
            cells = {
                row["impl"]: f"{row['us']:.1f} ({100 * row['roofline_share']:.0f} %)"
                for row in chosen
                if row["tokens"] == tokens
            }
            lines.append(f"| {tokens} | " + " | ".join(cells.get(name, "") for name in names) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--tune", action="store_true", help="try tiles, and write tiles.json")
    parser.add_argument("--vllm", type=Path, help="fused_moe.py of vllm, for its Triton kernel")
    parser.add_argument("--limit-s", type=float, default=400)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--commit", help="the commit that is measured, where the copy has no .git")
    parser.add_argument("--compile", nargs=2, type=int, metavar=("SHARE", "SHARES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        compile_share(*options.compile, options.shapes)
        return 0
    begun = time.time()
    if options.tune:
        shares = max(2, min(12, (os.cpu_count() or 4) - 2))
        command = [sys.executable, __file__, "--shapes", *options.shapes, "--compile"]
        workers = [subprocess.Popen([*command, str(i), str(shares)]) for i in range(shares)]
        wait_or_stop(workers, begun + options.limit_s / 3)
        print(f"compiled in {time.time() - begun:.0f} s", file=sys.stderr, flush=True)
    quiet_capture()
    peaks = measure_peaks()
    rows: list[Any] = []
    tiles: list[Any] = []
    for number, shape in enumerate(options.shapes, 1):
        until = begun + options.limit_s * number / len(options.shapes)
        more, found = bench(shape, options, peaks, until)
        rows, tiles = rows + more, tiles + found
    import triton

    document = {**provenance(peaks.name, triton=triton.__version__), "rows": rows}
    if options.commit:
        document["commit"] = options.commit
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "experts.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.out / "experts.md").write_text(markdown(document))
    if options.tune:
        (options.out / "tiles.json").write_text(json.dumps(tiles, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
