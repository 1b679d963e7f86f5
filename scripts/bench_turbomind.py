"""Workspaces of ours before the real engine: tiny checkpoints are packed and judged by a command that runs LMDeploy 0.6.5's engine.

    python scripts/bench_turbomind.py --oracle "python3 PATH/turbomind_oracle.py" [--load-only] [--out benchmarks]
    python scripts/bench_turbomind.py --speed --oracle ...     decode speed of the engine on a 7B shape in int4 (random weights)

The oracle command takes a workspace and `--hf-fp16 FOLDER --json FILE`, and writes {"verdicts": [[check, passed], ...], "logits":
{"rel_fro", "argmax", "argmax_ties"}, ...}. It reads Llama-like names: the others are renamed here, tensor by tensor, independently of
the packing code. Mixtral is judged with equal experts (then it is a dense model), and with different ones by names and bytes.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from bench_pack import SHAPES, write_packed_source  # noqa: E402
from provenance import provenance  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_checkpoints import quantize_source, write_source  # noqa: E402
from torch import Tensor  # noqa: E402
from turbomind_rows import merge_rows  # noqa: E402

from convert.readers import open_checkpoint  # noqa: E402
from convert.turbomind.writer import write_workspace  # noqa: E402
from engine.config import EngineConfig  # noqa: E402
from engine.measure.throughput import Contender, open_bench  # noqa: E402
from engine.source import ModelSource  # noqa: E402

LIMITS = {"float16": 5e-3, "int4": 5e-3, "bfloat16": 2e-2}  # relative error of the logits
ARGMAX = 0.99
PADDED_DEMO = {  # `quantize awq --pad` of the demo model
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
}
LLAMA3 = {
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}
SPEED_TOKENS = 128  # the oracle's: it times 136 new tokens less 8
SPEED_PROMPT = 16  # tokens, as in the command


@dataclass(frozen=True)
class Case:
    """One workspace. `changes` go into config.json; `judged` False: its logits have no reference."""

    name: str
    family: str
    format: str
    tp: int = 1
    changes: dict[str, Any] = field(default_factory=dict)
    judged: bool = True
    truncated: bool = False
    offset: float = 0.5  # of the rows of weights, see `random_weights`

    @property
    def emulated(self) -> bool:
        """Whether the oracle's reading of the workspace itself knows such a model."""
        return self.family != "mixtral" and "rope_scaling" not in self.changes


def cases() -> list[Case]:
    found = []
    for kind in ("float16", "int4"):
        for family in ("llama", "mistral", "qwen2", "internlm", "internlm2", "qwen"):
            found.append(Case(family, family, kind))
        found.append(Case("llama3 rope", "llama", kind, changes=LLAMA3))
        found.append(Case("padded demo", "llama", kind, changes=PADDED_DEMO))
        found.append(Case("mixtral, equal experts", "mixtral", kind))
        found.append(Case("mixtral", "mixtral", kind, judged=False))
        for family in ("llama", "qwen2", "internlm", "internlm2", "mixtral"):
            found.append(Case(family, family, kind, tp=2, judged=False))
        found.append(
            Case("llama, odd vocabulary", "llama", kind, tp=2, changes={"vocab_size": 513}, judged=False)
        )
        found.append(
            Case(
                "llama, KV heads copied",
                "llama",
                kind,
                tp=4,
                changes={"intermediate_size": 640},
                judged=False,
            )
        )
    found += [Case(family, family, "bfloat16") for family in ("llama", "qwen2")]
    for kind in ("float16", "int4", "bfloat16"):
        found.append(Case("qwen2, half the offset", "qwen2", kind, offset=0.25))
    found.append(Case("llama, truncated file", "llama", "int4", judged=False, truncated=True))
    return found


def build(case: Case, folder: Path) -> tuple[Path, Path | None]:
    """Write the checkpoint, its workspace and a reference with Llama-like names; (workspace, reference)."""
    dtype = "bfloat16" if case.format == "bfloat16" else "float16"
    source = write_source(folder / "source", case.family, dtype, offset=case.offset, **case.changes)
    if case.name == "mixtral, equal experts":
        make_experts_equal(source)
    if case.format == "int4":
        source = quantize_source(source, folder / "awq")
    write_workspace(open_checkpoint(source), folder / "workspace", tp=case.tp)
    reference = llama_like(source, folder / "reference", case.family) if case.judged else None
    return folder / "workspace", reference


def make_experts_equal(source: Path) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if ".experts." in name:
            before, after = name.split(".experts.")
            tensors[name] = tensors[f"{before}.experts.0.{after.split('.', 1)[1]}"].clone()
    save_file(tensors, path, metadata={"format": "pt"})


def llama_like(source: Path, out: Path, family: str) -> Path:
    """The same weights under Llama's names. Fused tensors are cut along their output axis (1 in packed tensors), by whole heads."""
    raw = json.loads((source / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors |= load_file(path)
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads", heads)
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, part = name.rsplit(".", 1)
        axis = 0 if part in ("weight", "bias") else 1
        if family == "qwen":
            cut = (
                dict(zip("qkv", tensor.chunk(3, dim=axis), strict=True)) if module.endswith("c_attn") else {}
            )
        elif module.endswith("attention.wqkv"):
            slots = tensor.unflatten(axis, (kv_heads, heads // kv_heads + 2, -1)).movedim(
                (axis, axis + 1), (0, 1)
            )
            pick = {"q": slots[:, :-2].flatten(0, 1), "k": slots[:, -2], "v": slots[:, -1]}
            cut = {role: piece.movedim(0, axis).flatten(axis, axis + 1) for role, piece in pick.items()}
        else:
            cut = {}
        if cut:
            block = ".".join(module.split(".")[:3])
            renamed |= {
                f"{renamed_module(block + '.')}self_attn.{role}_proj.{part}": p for role, p in cut.items()
            }
        elif (new := renamed_module(module)) is not None:
            renamed[f"{new}.{part}"] = tensor
    raw.update(
        rms_norm_eps=raw.get("rms_norm_eps", raw.get("layer_norm_epsilon")), num_key_value_heads=kv_heads
    )
    out.mkdir()
    (out / "config.json").write_text(json.dumps(raw))
    save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, out / "model.safetensors")
    return out


NAMES = (
    ("transformer.h.", "model.layers."),
    ("transformer.wte", "model.embed_tokens"),
    ("transformer.ln_f", "model.norm"),
    ("attn.c_proj", "self_attn.o_proj"),
    ("mlp.w2", "mlp.gate_proj"),
    ("mlp.w1", "mlp.up_proj"),
    ("mlp.c_proj", "mlp.down_proj"),
    (".ln_1", ".input_layernorm"),
    (".ln_2", ".post_attention_layernorm"),
    ("model.tok_embeddings", "model.embed_tokens"),
    ("attention.wo", "self_attn.o_proj"),
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
    ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("block_sparse_moe.experts.0.w1", "mlp.gate_proj"),
    ("block_sparse_moe.experts.0.w3", "mlp.up_proj"),
    ("block_sparse_moe.experts.0.w2", "mlp.down_proj"),
)


def renamed_module(module: str) -> str | None:
    """Llama's name; None for the router and for all experts but the first."""
    if module == "output":
        return "lm_head"
    for old, new in NAMES:
        module = module.replace(old, new)
    return None if "block_sparse_moe" in module else module


def judge(case: Case, folder: Path, oracle: list[str]) -> list[dict[str, Any]]:
    """Build, run the oracle, and turn its verdicts into rows. A workspace of several ranks is judged by names and bytes."""
    name = f"{case.name} {case.format} tp {case.tp}"
    workspace, reference = folder / "workspace", folder / "reference"
    result = folder / "result.json"
    arguments = [*oracle, str(workspace), "--json", str(result)]
    if case.truncated:
        arguments.append("--expect-fail")
    elif "--load-only" not in oracle:
        if not case.judged:
            arguments.append("--load-only")
        else:
            arguments += [
                "--hf-fp16",
                str(reference),
                "--rel",
                str(LIMITS[case.format]),
                "--argmax",
                str(ARGMAX),
            ]
            if case.emulated:
                arguments.append("--emulate")
    begin = time.perf_counter()
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    print(
        f"== {name}: {time.perf_counter() - begin:.0f} s, exit {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-800:]}",
        flush=True,
    )
    found = json.loads(result.read_text()) if result.is_file() else {"verdicts": [], "stage": "no result"}
    return rows_of(case, found, done.returncode, "--load-only" in arguments)


def rows_of(case: Case, found: dict[str, Any], status: int, load_only: bool) -> list[dict[str, Any]]:
    """The verdicts of one run as rows; a check that was not reached has failed, and `note` says where the engine stopped."""
    row = {"name": case.name, "format": case.format, "tp": case.tp}
    if case.truncated:
        return [{**row, "check": "truncated", "passed": status == 0, "rel_error": None, "argmax": None}]
    verdicts = dict(found["verdicts"])
    silent = verdicts.get("load", False) or "odd vocabulary" in case.name  # the engine says that it pads one
    verdicts["bytes"] = verdicts.get("bytes", False) and silent
    checks = ["names", "bytes"]
    if not load_only and case.judged:
        checks += [*(["emulate"] if case.emulated else []), "logits", "greedy"]
    rows = []
    for check in checks:
        numbers = found.get(check, {})
        argmax = numbers.get("argmax")
        if numbers.get("total"):
            argmax = numbers["same"] / numbers["total"]
        figures = {"rel_error": numbers.get("rel_fro"), "argmax": argmax}
        rows.append({**row, "check": check, "passed": bool(verdicts.get(check)), **figures})
        if not load_only and found.get("stage") != "done":
            rows[-1]["note"] = f"the engine stopped at {found.get('stage')!r}"
    return rows


def run_cases(args: argparse.Namespace, oracle: list[str]) -> None:
    work = Path(tempfile.mkdtemp(prefix="turbomind-", dir=args.work))
    chosen = [case for case in cases() if args.only is None or args.only in f"{case.name} {case.format}"]
    if args.judged:
        chosen = [case for case in chosen if case.judged or case.truncated]
    chosen.sort(key=lambda case: not case.judged)  # stable: what needs the GPU comes first
    folders = [work / str(number) for number in range(len(chosen))]
    begin = time.perf_counter()
    for case, folder in zip(chosen, folders, strict=True):
        build(case, folder)
    print(f"{len(chosen)} workspaces packed in {time.perf_counter() - begin:.1f} s", flush=True)
    how = (
        "the engine's loader on host memory (no kernels)"
        if "--load-only" in oracle
        else "the engine with its kernels"
    )

    def in_time(case: Case, folder: Path) -> list[dict[str, Any]]:
        if time.perf_counter() - begin > args.seconds:
            print(
                f"== {case.name} {case.format} tp {case.tp}: not started, {args.seconds} s are over",
                flush=True,
            )
            return []
        return judge(case, folder, oracle)

    rows = judge(chosen[0], folders[0], oracle)  # alone: the engine is unpacked at its first use
    merge_rows(args.out, rows, device(), how)
    with ThreadPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(in_time, *pair) for pair in zip(chosen[1:], folders[1:], strict=True)]
        for job in as_completed(jobs):
            rows += job.result()
            merge_rows(
                args.out, rows, device(), how
            )  # after each: a run that is cut short keeps what it found
    shutil.rmtree(work)
    print((args.out / "turbomind.md").read_text())
    failed = [row for row in rows if not row["passed"]]
    print(f"{len(rows)} checks, {len(failed)} fail, {time.perf_counter() - begin:.0f} s")
    for row in failed:
        print("FAILS", json.dumps(row))


def device() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def run_speed(args: argparse.Namespace, oracle: list[str]) -> None:
    """Decode tokens/s of the engine, and of ours, on one 7B-shape int4 workspace of random words, batch 1, 8 and 16, for each KV cache."""
    work = Path(tempfile.mkdtemp(prefix="turbomind-speed-", dir=args.work))
    begin = time.perf_counter()
    write_packed_source(work / "awq", SHAPES[args.shape])
    made_s = time.perf_counter() - begin
    packed = write_workspace(open_checkpoint(work / "awq"), work / "workspace")
    print(f"made in {made_s:.1f} s, packed in {packed.elapsed_s:.1f} s", flush=True)
    shutil.rmtree(work / "awq")
    rows: list[dict[str, Any]] = []
    for kv, policy in (("fp16", 0), ("int8", 8)):
        left = int(args.seconds - (time.perf_counter() - begin))
        if left < 60:
            print(f"KV cache {kv}: not started, {args.seconds} s are nearly over", flush=True)
            break
        result = work / f"{kv}.json"
        command = [*oracle, str(work / "workspace"), "--speed", "--tokens", "0", "--json", str(result)]
        command += ["--quant-policy", str(policy), "--timeout", str(left - 20)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout[-3000:], done.stderr[-500:], flush=True)
        found = json.loads(result.read_text()) if result.is_file() else {}
        for batch, speed in found.get("speed", {}).items():
            row = {"impl": "turbomind", "shape": args.shape, "tp": 1, "mode": "static", "weights": "int4"}
            row |= {"kv": kv, "kv_mode": "dynamic" if policy else None, "batch": int(batch)}
            rows.append({**row, "input_len": SPEED_PROMPT, "output_len": SPEED_TOKENS, "tok_per_s": speed})
        for row in own_speed(work / "workspace", args.shape, 16 if kv == "fp16" else 8):
            rows.append(row)
            print(f"ours, KV {row['kv']}, batch {row['batch']}: {row['tok_per_s']:,.1f} tok/s", flush=True)
        document = provenance(device()) | {"pack_s": packed.elapsed_s, "rows": rows}
        (args.out / "turbomind_speed.json").write_text(json.dumps(document, indent=1) + "\n")
    shutil.rmtree(work)
    print(speed_table(rows))


def own_speed(workspace: Path, shape: str, kv_bits: int) -> Iterator[dict[str, Any]]:
    """Rows of our engine on the same workspace: median of the decode steps of SPEED_TOKENS tokens behind the same short prompt."""
    batches = (1, 8, 16)
    config = EngineConfig(
        max_batch=max(batches), context_length=512, kv_bits=kv_bits, graph_batches=batches, warm_up=False
    )
    with open_bench(Contender(ModelSource(str(workspace)), config)) as bench:
        for batch in batches:
            bench.settle(batch, SPEED_PROMPT)
            row = bench.static(batch, SPEED_PROMPT, SPEED_TOKENS).to_json()
            yield {**row, "shape": shape}


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Both engines side by side, as Markdown."""
    speeds = {(row["impl"], row["kv"], row["batch"]): row["tok_per_s"] for row in rows}
    lines = [
        "| KV | batch | TurboMind tok/s | ours tok/s | ours over TurboMind |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (impl, kv, batch), speed in speeds.items():
        if impl == "turbomind" and (own := speeds.get(("ours", kv, batch))):
            lines.append(f"| {kv} | {batch} | {speed:,.0f} | {own:,.0f} | {own / speed:.2f}x |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--oracle", help="command that judges one workspace")
    parser.add_argument(
        "--load-only", action="store_true", help="names and bytes alone (an engine without a GPU)"
    )
    parser.add_argument("--judged", action="store_true", help="only the cases whose logits are judged")
    parser.add_argument("--only", help="cases whose name and format hold this text")
    parser.add_argument(
        "--speed", action="store_true", help="decode speed of the engine instead of the cases"
    )
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of --speed")
    parser.add_argument("--seconds", type=int, default=540, help="after which no further workspace is judged")
    parser.add_argument("--workers", type=int, default=4, help="workspaces judged at a time")
    parser.add_argument("--work", type=Path, help="folder for the models; the system's by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.oracle:
        parser.error("--oracle is needed")
    oracle = shlex.split(args.oracle) + (["--load-only"] if args.load_only else [])
    if args.speed:
        run_speed(args, oracle)
    else:
        run_cases(args, oracle)


if __name__ == "__main__":
    main()
