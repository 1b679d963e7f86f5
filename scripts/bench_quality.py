"""Perplexity of the presets on one or several models, in one process and on the same text: rows for benchmarks/quality.json.

usage: python scripts/bench_quality.py MODEL... --calib C4.txt --test wiki.test.raw --arms rtn,fast,default,best --out rows.json
MODEL and arms: see quality_arms.py. `best/` gives two rows, before and after an end-to-end pass.
The protocol: tokens of the whole calibration text, blocks at torch.randint starts of the seed; a test text as it stands, or FILE:rows for
its rows joined with blank lines; tokenized once, no BOS, windows of 2048, tail dropped; KL to the float model and top-1 agreement on the
first --kl-windows of them. The text of --valid is measured too, to choose settings by. Rows are written as soon as they are measured.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from provenance import provenance
from quality_arms import Arm, ModelSpec, parse_arm, parse_model
from torch import Tensor

from calib_data.blocks import CalibrationSet
from calib_data.sources import TextRequest, load_blocks
from convert.checkpoint import BlockWeights, Checkpoint
from convert.checkpoint_view import CheckpointView
from convert.pad import pad_checkpoint
from convert.readers import open_checkpoint
from convert.tokenizer.tokenizer import load_tokenizer
from engine.measure.perplexity import EvalTokens, PerplexityResult, Reference, paired_difference
from engine.model.forward import Model, compute_dtype
from quant.config import QuantConfig
from quant.evaluation.perplexity import EvalProtocol, join_rows, judge, release
from quant.evaluation.table import cache_of
from quant.in_memory import QuantizedModel, collect, end_to_end, measure_ranges
from quant.session import Session
from quant.state.block_record import HeadRanges
from quant.text.calibration import vocabulary_of
from quant.text.generate import SelfGenerator
from quant.text.sources import NoText, TextSource
from quant.walk import Step, walk


@dataclass(frozen=True)
class Judge:
    """The texts that models are judged by, and what the float model made of them."""

    texts: dict[str, tuple[EvalTokens, EvalProtocol]]
    first: dict[str, tuple[PerplexityResult, Reference]]

    def rows(
        self, model: Model, kv: tuple[int, str], ranges: list[HeadRanges] | None
    ) -> list[dict[str, Any]]:
        """A row for each text."""
        out = []
        for name, (tokens, protocol) in self.texts.items():
            known = self.first.get(name)
            simulated = cache_of(*kv, ranges)
            result, kept = judge(model, tokens, protocol, simulated, known[1] if known else None)
            if known is None:
                self.first[name] = known = (result, kept)
            interval = None
            if result is not known[0] and result.windows > 1:
                difference = paired_difference(known[0], result)
                interval = [difference.low, difference.high]
            row = {"text": name, "tokens": result.tokens, "windows": result.windows, "kv_bits": kv[0]}
            row |= {"kv_mode": kv[1] if kv[0] < 16 else "", "ppl": result.ppl, "ppl_diff_ci95": interval}
            row |= {"kl": result.kl, "top1": result.top1, "kl_windows": len(result.kl_windows)}
            out.append(row)
        return out


def read_tokens(folder: Path, text: Path, rows: bool, cache: Path | None) -> EvalTokens:
    """A text in the model's tokens, no BOS; from `cache`/NAME.tokens.safetensors where that exists."""
    name = text.name + (" rows" if rows else "")
    if not rows and cache is not None and (found := cache / f"{text.name}.tokens.safetensors").is_file():
        from safetensors.torch import load_file

        return EvalTokens(load_file(found)["tokens"].long(), False, name, "", "")
    raw = text.read_bytes().decode("utf-8")
    ids = load_tokenizer(folder).encode_plain(join_rows(raw) if rows else raw)
    return EvalTokens(torch.tensor(list(ids), dtype=torch.int64), False, name, "", "")


def calibration(ids: Tensor, quant: QuantConfig) -> Tensor:
    """Token blocks (S, L) at random starts."""
    generator = torch.Generator().manual_seed(quant.seed)
    starts = torch.randint(0, len(ids) - quant.seqlen - 1, (quant.samples,), generator=generator)
    return torch.stack([ids[start : start + quant.seqlen] for start in starts.tolist()])


def self_written(ckpt: Checkpoint, device: torch.device, dtype: torch.dtype) -> Tensor:
    """512 samples of 512 tokens that the model writes itself, end to end."""
    tokenizer = load_tokenizer(ckpt.tokenizer_dir)
    request = TextRequest(None, 512, 512, 0)
    writer = SelfGenerator(ckpt, device, dtype)
    return load_blocks(request, tokenizer, vocabulary_of(ckpt, tokenizer), writer).tokens.flatten()


class Bench:
    """One model: the arms run on it, and the rows that they give."""

    def __init__(self, spec: ModelSpec, args: argparse.Namespace, say: Any) -> None:
        self.spec, self.args, self.say = spec, args, say
        ckpt = open_checkpoint(str(spec.path))
        if spec.pad:
            ckpt = pad_checkpoint(ckpt, 128)
        self.device = torch.device(args.device)
        self.dtype = compute_dtype(ckpt.config, self.device, args.dtype)
        self.ckpt: Checkpoint = Held(ckpt)
        self.session = Session(self.ckpt, self.device, self.dtype)
        if spec.calib == Path("self"):
            self.calib = self_written(ckpt, self.device, self.dtype)
        else:
            cache = None if spec.calib else args.tokens
            self.calib = read_tokens(spec.path, spec.calib or args.calib, False, cache).ids
        texts = {}
        for entry in args.test:
            path, _, form = entry.partition(":")
            tokens = read_tokens(spec.path, Path(path), form == "rows", args.tokens)
            texts[tokens.text] = (tokens, EvalProtocol(args.window, args.windows or None, args.kl_windows))
        if args.valid:
            tokens = read_tokens(spec.path, args.valid, False, args.tokens)
            texts[tokens.text] = (tokens, EvalProtocol(args.window, args.valid_windows, args.valid_windows))
        self.judge = Judge(texts, {})
        model = Model.from_checkpoint(self.ckpt, self.device, self.dtype)
        self.put("fp", None, self.judge.rows(model, (16, ""), None), 0.0, 0.0, [])
        for kv in args.kv:
            if kv[1] == "dynamic":
                self.put("fp", None, self.judge.rows(model, kv, None), 0.0, 0.0, [])

    def put(
        self,
        name: str,
        arm: Arm | None,
        rows: list[dict[str, Any]],
        seconds: float,
        peak: float,
        notes: list[str],
    ) -> None:
        """Complete the rows of one result and hand them on."""
        quant = None if arm is None else arm.quant
        for row in rows:
            whole = {"model": self.spec.name, "method": name, "arm": "" if arm is None else arm.text}
            if quant is not None:
                whole |= {"bits": quant.bits, "group_size": quant.group_size, "seed": quant.seed}
                whole |= {"samples": quant.samples, "seqlen": quant.seqlen}
                whole |= {"calibration": (self.spec.calib or self.args.calib).name}
            whole |= row | {"seconds": round(seconds, 2), "peak_gib": round(peak, 2), "notes": notes}
            self.say(whole)

    def run(self, arm: Arm) -> None:
        """One arm: quantize, judge; with `distill`, before and after the end-to-end pass."""
        self._run(arm)
        release(self.device)

    @torch.no_grad()
    def _run(self, arm: Arm) -> None:
        quant = arm.quant
        source = TextSource(CalibrationSet(calibration(self.calib, quant), {}))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.time()
        remarks = Remarks()
        steps = walk(self.session, quant, source if quant.needs_text else NoText())
        made = collect(remarks.of(steps))
        if self.args.kv and made.ranges is None and source.tokens is not None and quant.needs_text:
            made = replace(made, ranges=measure_ranges(self.session, made.blocks, source.tokens))
        seconds = self._elapsed(started)
        self._judge(arm, quant.recipe.name, made, seconds, remarks.notes())
        for following in arm.passes:
            self._distill(following, made, source, seconds)

    def _distill(self, arm: Arm, made: QuantizedModel, source: TextSource, before: float) -> None:
        """An end-to-end pass from these blocks, which took `before` seconds."""
        started = time.time()
        done = end_to_end(self.session, arm.quant, made.blocks, source)
        seconds = before + self._elapsed(started)
        assert done.divergence is not None and source.tokens is not None
        notes = ["calibration KL {kl_first:.4f} -> {kl_last:.4f}".format(**done.divergence)]
        if self.args.kv and done.ranges is None:
            done = replace(done, ranges=measure_ranges(self.session, done.blocks, source.tokens))
        self._judge(arm, arm.quant.recipe.name + "+distill", done, seconds, notes)

    def _elapsed(self, started: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.time() - started

    def _judge(self, arm: Arm, name: str, made: QuantizedModel, seconds: float, notes: list[str]) -> None:
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        model = Model.from_checkpoint(made.checkpoint(self.ckpt, arm.quant), self.device, self.dtype)
        self.put(name, arm, self.judge.rows(model, (16, ""), None), seconds, peak, notes)
        for kv in self.args.kv if arm.quant.recipe.name in self.args.kv_presets else []:
            if kv[1] == "dynamic" or made.ranges is not None:
                self.put(name, arm, self.judge.rows(model, kv, made.ranges), seconds, peak, notes)

    def run_peer(self, name: str, quant: QuantConfig) -> None:
        """A peer on the same calibration blocks, judged by the same engine."""
        import tempfile

        from quant.evaluation.peers import quantize_with

        tokens = calibration(self.calib, quant)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            seconds = quantize_with(name, self.spec.path, Path(folder), tokens, quant, self.device)
            peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
            model = Model.from_checkpoint(open_checkpoint(folder), self.device, self.dtype)
            arm = Arm(name, quant)
            self.put(name, arm, self.judge.rows(model, (16, ""), None), seconds, peak, [])
        release(self.device)


class Remarks:
    """What stands out in the blocks of a walk."""

    def __init__(self) -> None:
        self._above: list[str] = []
        self._unlearned: list[str] = []
        self._warned: set[str] = set()

    def of(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The same steps, looked at on their way."""
        for step in steps:
            reports = step.result.reports
            for report in reports:
                self._warned |= set(report.warnings)
                if report.loss_after > report.loss_rtn * (1 + 1e-6) + 1e-20:
                    self._above.append(f"{step.index}.{report.role}")
            if any("block_before" in r.values and "rounding" not in r.steps for r in reports):
                self._unlearned.append(str(step.index))
            yield step

    def notes(self) -> list[str]:
        """A few sentences."""
        notes = [f"nothing learned in blocks {' '.join(self._unlearned)}"] if self._unlearned else []
        if self._above:
            notes.append(f"above plain rounding: {', '.join(self._above[:6])} ({len(self._above)})")
        return notes + sorted(self._warned)[:4]


class Held(CheckpointView):
    """A checkpoint that was read once, so that no arm is charged for the disk."""

    def __init__(self, source: Checkpoint) -> None:
        super().__init__(source)
        self.blocks = [source.block(i) for i in range(source.config.num_layers)]
        self.table = source.embedding()

    def block(self, index: int) -> BlockWeights:
        return self.blocks[index]

    def embedding(self) -> Tensor:
        return self.table


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Medians over seeds, by model, text, cache and arm."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        arm = ":".join(part for part in row["arm"].split(":") if not part.startswith("seed="))
        key = (row["model"], row["text"], row["method"], arm, f"kv{row['kv_bits']} {row['kv_mode']}")
        groups.setdefault(key, []).append(row)
    lines = []
    for key, found in groups.items():
        ppl = statistics.median(row["ppl"] for row in found)
        kls = [row["kl"] for row in found if row["kl"] is not None]
        tops = [row["top1"] for row in found if row["top1"] is not None]
        text = f"MEDIAN of {len(found)}  {' | '.join(key)}: ppl {ppl:.4f}"
        if kls:
            text += f" kl {statistics.median(kls):.4f} top1 {statistics.median(tops):.4f}"
        lines.append(text + f" seconds {statistics.median(row['seconds'] for row in found):.1f}")
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument(
        "--test", action="append", required=True, help="FILE or FILE:rows; again for more texts"
    )
    parser.add_argument("--valid", type=Path)
    parser.add_argument("--valid-windows", type=int, default=24)
    parser.add_argument("--tokens", type=Path, help="folder with tokenized texts of these models")
    parser.add_argument("--arms", default="rtn,gptq-r,awq,fast,default,best")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--peers", default="", help="names of quant/evaluation/peers.py, joined by commas")
    parser.add_argument(
        "--kv", default="", help="caches to simulate beside the float one: 8,8:static,4,4:static"
    )
    parser.add_argument("--kv-presets", default="default,best", help="arms that have rows of these caches")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=2048, help="tokens a window")
    parser.add_argument("--windows", type=int, default=0, help="0: all")
    parser.add_argument("--kl-windows", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no arm is started")
    args = parser.parse_args(arguments)
    pairs = (entry.partition(":") for entry in args.kv.split(",") if entry)
    args.kv = [(int(bits), mode or "dynamic") for bits, _, mode in pairs]
    args.kv_presets = args.kv_presets.split(",")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    args.peers = [name for name in args.peers.split(",") if name]
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    begun = time.time()
    specs = [parse_model(text) for text in args.models]
    torch.backends.cuda.matmul.allow_tf32 = True  # streams and judging; Cholesky is float32 in any case
    rows: list[dict[str, Any]] = []
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    document = provenance(device) | {"rows": rows}

    def say(row: dict[str, Any]) -> None:
        rows.append(row)
        args.out.write_text(json.dumps(document, indent=1))
        kl = "" if row["kl"] is None else f" kl {row['kl']:.4f} top1 {row['top1']:.4f}"
        kv = "" if row["kv_bits"] == 16 else f" kv{row['kv_bits']} {row['kv_mode']}"
        print(
            f"ROW {row['model']} | {row['text']} | {row['arm'] or row['method']} | {row['method']}{kv}: "
            f"ppl {row['ppl']:.4f}{kl} seconds {row['seconds']:.1f} peak {row['peak_gib']:.1f} {row['notes'] or ''}",
            flush=True,
        )

    for spec in specs:
        bench = Bench(spec, args, say)
        base = QuantConfig(
            group_size=spec.group_size or args.group_size, samples=args.samples, seqlen=args.seqlen
        )
        tasks: list[tuple[str, Any]] = []
        for seed in args.seeds:
            arms = [parse_arm(text, replace(base, seed=seed)) for text in args.arms.split(",") if text]
            tasks += [(f"{arm.text}:seed={seed}", (bench.run, arm)) for arm in arms]
        tasks += [(name, (bench.run_peer, name, base)) for name in args.peers]
        for name, (act, *what) in tasks:
            if time.time() - begun > args.budget:
                print(f"SKIP {spec.name} {name}: the time is used up", flush=True)
                continue
            try:
                act(*what)
            except Exception:  # one arm that fails leaves the others
                traceback.print_exc()
                print(f"FAILED {spec.name} {name}", flush=True)
    print("\n".join(summary(rows)), flush=True)
    print(f"done in {time.time() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
