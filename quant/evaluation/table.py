"""`evaluate table`: one model, many methods, one text: each is quantized in memory and judged on the same windows."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib_data.blocks import CalibrationSet
from convert.checkpoint import BlockWeights, Checkpoint
from convert.checkpoint_view import CheckpointView, WithFinalNorm
from convert.config import QuantFormat
from convert.readers import open_checkpoint
from engine.measure.perplexity import EvalTokens, PerplexityResult, Reference, paired_difference
from engine.model.forward import Model
from engine.model.kv_simulation import KVSimulation
from kernels.kv.pages import StaticKV
from quant.config import QuantConfig
from quant.evaluation.peers import quantize_with
from quant.evaluation.perplexity import Judgement, judge, release
from quant.kv.parameters import kv_parameters
from quant.memory import gpu_peak_gib, peak_rss_gib
from quant.recipes import DISTILLED, FLOAT, Recipe, usual_methods
from quant.walk import HeadRanges, distill_blocks, first_streams, measure_ranges, walk


@dataclass(frozen=True)
class Row:
    """One figure; the fields are those of benchmarks/quality.json. `ppl_diff_ci95`: interval of PPL minus the float model's."""

    model: str
    text: str
    windows: int
    method: str
    bits: int
    group_size: int | None
    kv_bits: int
    kv_mode: str | None
    distill: bool
    seed: int
    ppl: float
    ppl_diff_ci95: tuple[float, float] | None
    kl: float | None
    top1: float | None
    kl_windows: int
    seconds: float  # of the quantization
    peak_gib: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def key(self) -> str:
        """Names the row within a table."""
        group = "" if self.group_size is None else f" int{self.bits} g{self.group_size}"
        kv = "" if self.kv_bits == 16 else f" kv{self.kv_bits} {self.kv_mode}"
        return f"{self.method}{'+distill' if self.distill else ''}{group}{kv}"


class QuantizedInMemory(CheckpointView):
    """A checkpoint whose blocks were just quantized; the rest is its source's, in float16 as a packed checkpoint holds it."""

    def __init__(self, inner: Checkpoint, blocks: Sequence[BlockWeights], fmt: QuantFormat) -> None:
        super().__init__(inner, kind="awq", config=replace(inner.config, quantization=fmt))
        self._blocks = blocks

    def block(self, index: int) -> BlockWeights:
        return self._blocks[index]

    def embedding(self) -> Tensor:
        return self.inner.embedding().half()

    def final_norm(self) -> Tensor:
        return self.inner.final_norm().half()

    def lm_head(self) -> Tensor:
        return self.inner.lm_head().half()


@dataclass(frozen=True)
class TableRequest:
    """Which rows: every method at every width and group, each with every cache. `base` gives the other settings."""

    base: QuantConfig
    methods: tuple[str | Recipe, ...] = field(
        default_factory=usual_methods
    )  # names of `recipes.methods`, or recipes
    bits: tuple[int, ...] = (4, 3)
    group_sizes: tuple[int, ...] = (128,)
    kv: tuple[tuple[int, str], ...] = ((16, "dynamic"),)  # (bits, mode); 16 is the float cache
    peers: tuple[str, ...] = ()  # of `quant.evaluation.peers`, after our own rows
    how: Judgement = field(default_factory=lambda: Judgement(kl_windows=32))

    def arms(self) -> Iterator[QuantConfig | None]:
        """None for the float model, then the configurations."""
        if FLOAT in self.methods:
            yield None
        for bits in self.bits:
            for group_size in self.group_sizes:
                for method in self.methods:
                    if method != FLOAT:
                        preset = method if isinstance(method, Recipe) else method.removesuffix(DISTILLED)
                        yield replace(
                            self.base,
                            preset=preset,
                            distill=method != preset,
                            bits=bits,
                            group_size=group_size,
                        )


def evaluate_table(
    ckpt: Checkpoint,
    name: str,
    request: TableRequest,
    text: CalibrationSet | None,
    tokens: EvalTokens,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> list[Row]:
    """The rows, in the order of the arms. The float model is judged first even where it has no row: KL needs it."""
    first: PerplexityResult | None = None
    reference: Reference | None = None
    rows: list[Row] = []
    arms = list(request.arms())
    if None not in arms:
        arms.insert(0, None)
    for number, quant in enumerate(arms, start=1):
        begin = time.monotonic()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if quant is None:
            model, ranges = Model.from_checkpoint(ckpt, device, dtype), None
        else:
            model, ranges = quantized_model(ckpt, quant, text, device, dtype, needs_ranges(request))
        seconds = time.monotonic() - begin if quant is not None else 0.0
        for kv_bits, kv_mode in request.kv:
            if kv_mode == "static" and ranges is None:
                continue
            kv = cache_of(kv_bits, kv_mode, ranges)
            result, kept = judge(model, tokens, request.how, kv, reference)
            if first is None:
                first, reference = result, kept
            if quant is None and FLOAT not in request.methods:
                continue
            row = make_row(name, quant, request.base.seed, result, first, seconds, device)
            rows.append(row)
            say(f"{number}/{len(arms)}  {row.key}: ppl {row.ppl:.3f}, {seconds:.0f} s")
        del model
        release(device)
    if request.peers and text is not None and first is not None and reference is not None:
        for bits, group_size in product(request.bits, request.group_sizes):
            quant = replace(request.base, bits=bits, group_size=group_size)
            for peer in request.peers:
                model, seconds = peer_model(peer, ckpt, quant, text, device, dtype)
                result, _ = judge(model, tokens, request.how, None, reference)
                row = make_row(name, quant, request.base.seed, result, first, seconds, device)
                rows.append(replace(row, method=peer))
                say(f"{peer} int{bits} g{group_size}: ppl {row.ppl:.3f}, {seconds:.0f} s")
                del model
                release(device)
    return rows


def peer_model(
    peer: str,
    ckpt: Checkpoint,
    quant: QuantConfig,
    text: CalibrationSet,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Model, float]:
    """What a peer makes of the model on this text, in our engine, and the seconds of its search."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = quantize_with(peer, ckpt.path, Path(folder), text.tokens, quant, device)
        return Model.from_checkpoint(open_checkpoint(folder), device, dtype), seconds


def needs_ranges(request: TableRequest) -> bool:
    return any(mode == "static" and bits != 16 for bits, mode in request.kv)


def cache_of(kv_bits: int, kv_mode: str, ranges: list[HeadRanges] | None) -> KVSimulation | None:
    """The cache of a row; static parameters come from the ranges of its own quantized blocks."""
    if kv_bits == 16:
        return None
    bits = 8 if kv_bits == 8 else 4
    if kv_mode != "static" or ranges is None:
        return KVSimulation(bits)  # type: ignore[arg-type]
    table, _ = kv_parameters(ranges)
    parts = ("k.scale", "k.zero", "v.scale", "v.zero")
    params = [StaticKV(*(table[f"layers.{i}.{part}"] for part in parts)) for i in range(len(ranges))]
    return KVSimulation(bits, "static", params)  # type: ignore[arg-type]


def quantized_model(
    ckpt: Checkpoint,
    quant: QuantConfig,
    text: CalibrationSet | None,
    device: torch.device,
    dtype: torch.dtype,
    with_ranges: bool = False,
) -> tuple[Model, list[HeadRanges] | None]:
    """The model quantized in memory, and the ranges of its K and V where they are asked for.

    With ranges it is the model that `quantize awq --kv-bits 8` writes.
    """
    if with_ranges:
        quant = replace(quant, kv_bits=8)
    streams = None
    if text is not None and (quant.needs_text or with_ranges):
        streams = first_streams(ckpt, text.tokens, quant, device, dtype)
    blocks: list[BlockWeights] = []
    ranges: list[HeadRanges] = []
    tokens = None if text is None else text.tokens
    for step in walk(ckpt, quant, streams, device, dtype, tokens=tokens):
        blocks.append(step.result.weights)
        if step.ranges is not None:
            ranges.append(step.ranges)
    origin = ckpt
    if quant.distill and text is not None:
        blocks, norm, _ = distill_blocks(ckpt, blocks, quant, text.tokens, device)
        origin = WithFinalNorm(ckpt, norm)
        ranges = measure_ranges(ckpt, blocks, text.tokens, device, dtype) if with_ranges else []
    made = QuantizedInMemory(origin, blocks, QuantFormat(quant.bits, quant.group_size))
    return Model.from_checkpoint(made, device, dtype), ranges if len(ranges) == len(blocks) else None


def make_row(
    name: str,
    quant: QuantConfig | None,
    seed: int,
    result: PerplexityResult,
    first: PerplexityResult,
    seconds: float,
    device: torch.device,
) -> Row:
    """A row from a result and the float model's."""
    interval = None
    if result is not first and result.windows > 1:
        difference = paired_difference(first, result)
        interval = (difference.low, difference.high)
    return Row(
        model=name,
        text=result.text,
        windows=result.windows,
        method=FLOAT if quant is None else quant.recipe.name,
        bits=16 if quant is None else quant.bits,
        group_size=None if quant is None else quant.group_size,
        kv_bits=result.kv_bits,
        kv_mode=result.kv_mode,
        distill=quant is not None and quant.distill,
        seed=seed,
        ppl=result.ppl,
        ppl_diff_ci95=interval,
        kl=result.kl,
        top1=result.top1,
        kl_windows=len(result.kl_windows),
        seconds=round(seconds, 3),
        peak_gib=round(gpu_peak_gib() if device.type == "cuda" else peak_rss_gib(), 3),
    )
