"""Perplexity of the presets on one model, in one process and on the same text: writes rows for benchmarks/quality.json.

usage: python scripts/bench_quality.py MODEL_DIR --calib C4.txt --test wiki.test.raw --arms rtn,fast,default,best --out rows.json
An arm is PRESET[:bits=3][:group=64][:seed=0][:distill=1][:name=value], any other name being a field of QuantConfig.
The protocol: tokens of the whole calibration text, blocks at torch.randint starts of the seed; test text as it stands, tokenized
once, no BOS, windows of 2048, tail dropped; KL to the float model and top-1 agreement on the first --kl-windows of them.
"""

import argparse
import datetime
import json
import math
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint
from convert.readers import open_checkpoint
from engine.attention import causal_attend
from engine.block import Block
from engine.model import Model, compute_dtype
from quant.blocks import quantize_block
from quant.config import QuantConfig
from quant.records import LinearReport, Streams
from quant.walk import error_metrics


def tokenize(folder: Path, text: Path, cache: Path | None) -> Tensor:
    """Tokens (T,) int64 of a whole file, no BOS; read from `cache`/NAME.tokens.safetensors where that exists."""
    from safetensors.torch import load_file

    if cache is not None and (found := cache / f"{text.name}.tokens.safetensors").is_file():
        return load_file(found)["tokens"].long()
    from convert.tokenizer import load_tokenizer

    ids = load_tokenizer(folder).encode_plain(text.read_bytes().decode("utf-8"))
    return torch.tensor(list(ids), dtype=torch.int64)


def calibration(ids: Tensor, samples: int, seqlen: int, seed: int) -> Tensor:
    """Token blocks (S, L) at random starts."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - seqlen - 1, (samples,), generator=generator)
    return torch.stack([ids[start : start + seqlen] for start in starts.tolist()])


def build(
    ckpt: Checkpoint, blocks: list[BlockWeights], norm: Tensor, device: str, dtype: torch.dtype
) -> Model:
    """A model of these blocks with the checkpoint's embedding and head."""
    embedding = ckpt.embedding().to(device=device, dtype=dtype)
    head = embedding if ckpt.config.tie_embeddings else ckpt.lm_head().to(device=device, dtype=dtype)
    made = [Block(ckpt.config, block, dtype, device) for block in blocks]
    return Model(ckpt.config, embedding, made, norm.to(device=device, dtype=dtype), head)


@torch.no_grad()
def evaluate(
    model: Model, reference: Model | None, ids: Tensor, windows: int, kl_windows: int
) -> dict[str, object]:
    """NLL of each window, perplexity, KL to the reference and top-1 agreement on the first windows."""
    length, device = 2048, model.device
    batch = 4 if device.type == "cuda" else 1
    nll, kl, top, seen = [], 0.0, 0.0, 0
    for start in range(0, windows, batch):
        count = min(batch, windows - start)
        ids_of = ids[start * length : (start + count) * length].to(device)
        positions = torch.arange(length, device=device).repeat(count)
        attend = causal_attend(count, length, model.config)
        logits = model(ids_of, positions, attend).view(count, length, -1)
        wanted = None
        if reference is not None and start < kl_windows:
            wanted = reference(ids_of, positions, attend).view(count, length, -1)
        for k, window in enumerate(ids_of.view(count, length)):
            given = logits[k, :-1]
            nll.append(F.cross_entropy(given, window[1:]))
            if wanted is not None and start + k < kl_windows:
                target = wanted[k, :-1]
                kl += float(
                    F.kl_div(given.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
                )
                top += float((given.argmax(-1) == target.argmax(-1)).sum())
                seen += length - 1
    values = torch.stack(nll).double().cpu()
    return {
        "nll": values.tolist(),
        "ppl": math.exp(float(values.mean())),
        "kl": kl / max(seen, 1),
        "top1": top / max(seen, 1),
    }


def parse_arm(text: str, base: dict[str, object]) -> QuantConfig:
    """An arm as a configuration."""
    preset, *options = text.split(":")
    values: dict[str, object] = {**base, "preset": preset}
    types = {field.name: field.type for field in fields(QuantConfig)}
    for option in options:
        name, value = option.split("=")
        name = {"group": "group_size"}.get(name, name)
        kind = types[name]
        values[name] = (
            value not in ("0", "false") if kind is bool else kind(value) if kind in (int, float) else value
        )
    return QuantConfig(**values)  # type: ignore[arg-type]


@torch.no_grad()
def quantize_model(
    ckpt: Checkpoint,
    source: list[BlockWeights],
    quant: QuantConfig,
    tokens: Tensor,
    device: str,
    dtype: torch.dtype,
) -> tuple[list[BlockWeights], Tensor, list[LinearReport]]:
    """All blocks, and the final norm."""
    norm = ckpt.final_norm().half()
    streams = None
    if quant.needs_text:
        x = F.embedding(tokens.to(device), ckpt.embedding().to(device=device, dtype=dtype))
        streams = Streams(x, x if quant.preset in ("fast", "gptq", "gptq-r") else x.clone())
    blocks, reports = [], []
    metrics = error_metrics(ckpt, quant, tokens, torch.device(device))
    for index, weights in enumerate(source):
        metric = metrics[index] if metrics else None
        result = quantize_block(weights, ckpt.config, quant, streams, device, dtype, metric=metric)
        streams = result.streams
        blocks.append(result.weights)
        reports += result.reports
    if quant.distill:
        from quant.distill import distill

        embedding = ckpt.embedding().to(device)
        head = embedding if ckpt.config.tie_embeddings else ckpt.lm_head().to(device)
        blocks, norm, _ = distill(
            source, blocks, ckpt.config, quant, tokens, embedding, ckpt.final_norm(), head, device
        )
    return blocks, norm, reports


def interval(nll: list[float], other: list[float]) -> float:
    """Half-width of the 95 % interval of the paired difference of mean NLL."""
    delta = torch.tensor(nll, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    return 1.96 * float(delta.std()) / math.sqrt(len(delta)) if len(delta) > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, help="folder with tokenized texts")
    parser.add_argument("--arms", default="rtn,gptq-r,awq,fast,default,best")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=0, help="0: all")
    parser.add_argument("--kl-windows", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no arm is started")
    args = parser.parse_args()
    begun = time.time()
    ckpt = open_checkpoint(args.model)
    device = args.device
    dtype = {
        "auto": compute_dtype(ckpt.config, device),
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }[args.dtype]
    test = tokenize(args.model, args.test, args.tokens)
    calib = tokenize(args.model, args.calib, args.tokens)
    windows = min(len(test) // 2048, args.windows or 1 << 30)
    source = [ckpt.block(i) for i in range(ckpt.config.num_layers)]
    torch.backends.cuda.matmul.allow_tf32 = True  # evaluation and streams; Cholesky is float32 in any case
    float_model = build(ckpt, source, ckpt.final_norm(), device, dtype)
    started = time.time()
    fp = evaluate(float_model, None, test, windows, 0)
    print(
        f"tokens {len(test)} windows {windows}  fp ppl {fp['ppl']:.4f}  ({time.time() - started:.1f} s)",
        flush=True,
    )
    rows: list[dict[str, object]] = []
    base = {"group_size": args.group_size, "samples": args.samples, "seqlen": args.seqlen}
    device_name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    document = {
        "command": "python " + " ".join(sys.argv),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": device_name,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "rows": rows,
    }
    common = {
        "model": args.model.name,
        "text": args.test.name,
        "windows": windows,
        "kv_bits": 16,
        "kv_mode": "",
    }
    rows.append({**common, "method": "fp", "ppl": fp["ppl"]})
    for arm in args.arms.split(","):
        if time.time() - begun > args.budget:
            print(f"SKIP {arm}: the time is used up", flush=True)
            continue
        quant = parse_arm(arm, base)
        tokens = calibration(calib, quant.samples, quant.seqlen, quant.seed)
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.time()
        blocks, norm, reports = quantize_model(ckpt, source, quant, tokens, device, dtype)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.time() - started
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else 0.0
        result = evaluate(
            build(ckpt, blocks, norm, device, dtype), float_model, test, windows, args.kl_windows
        )
        above = sum(report.loss_after > report.loss_rtn * (1 + 1e-6) for report in reports)
        warnings = sorted({w for report in reports for w in report.warnings})
        row = {
            **common,
            "method": quant.preset,
            "arm": arm,
            "bits": quant.bits,
            "group_size": quant.group_size,
            "distill": quant.distill,
            "seed": quant.seed,
            "ppl": result["ppl"],
            "ppl_diff_ci95": interval(result["nll"], fp["nll"]) * result["ppl"],
            "kl": result["kl"],
            "top1": result["top1"],
            "kl_windows": min(args.kl_windows, windows),
            "seconds": seconds,
            "peak_gib": peak,
            "linears_above_rtn": above,
        }
        rows.append(row)
        print(
            f"RESULT {arm:40s} ppl {result['ppl']:.4f} kl {result['kl']:.4f} top1 {result['top1']:.4f} "
            f"seconds {seconds:.1f} peak {peak:.1f} GiB above-rtn {above} {warnings[:3]}",
            flush=True,
        )
        args.out.write_text(json.dumps(document, indent=1))
    args.out.write_text(json.dumps(document, indent=1))
    print(f"done in {time.time() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
