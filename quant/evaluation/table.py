"""`evaluate table`: one model, many methods, one text: each is quantized in memory and judged on the same windows."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from calib_data.blocks import CalibrationSet
from convert.checkpoint import Checkpoint
from convert.readers import open_checkpoint
from engine.measure.perplexity import EvalTokens, PerplexityResult, Reference, paired_difference
from engine.model.forward import Model
from engine.model.kv_simulation import KVSimulation
from kernels.kv.pages import StaticKV
from quant.config import QuantConfig
from quant.evaluation.kept_rows import KeptRows
from quant.evaluation.peers import quantize_with
from quant.evaluation.perplexity import EvalProtocol, judge, release
from quant.in_memory import quantize_in_memory
from quant.kv.parameters import kv_parameters
from quant.memory import gpu_peak_gib, peak_rss_gib
from quant.recipes import DISTILLED, FLOAT, Recipe, usual_methods
from quant.session import Session
from quant.state.block_record import HeadRanges
from quant.text.sources import CalibrationSource, source_of


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
        """The row as plain JSON data."""
        return asdict(self)

    @property
    def key(self) -> str:
        """Names the row within a table."""
        group = "" if self.group_size is None else f" int{self.bits} g{self.group_size}"
        kv = "" if self.kv_bits == 16 else f" kv{self.kv_bits} {self.kv_mode}"
        return f"{self.method}{'+distill' if self.distill else ''}{group}{kv}"


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
    protocol: EvalProtocol = field(default_factory=lambda: EvalProtocol(kl_windows=32))

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
    session: Session,
    name: str,
    request: TableRequest,
    text: CalibrationSet | None,
    tokens: EvalTokens,
    kept: KeptRows | None = None,
) -> list[Row]:
    """The rows, in the order of the arms; `name` is what they call the model. Rows that `kept` has are not made again.

    The float model is judged first even where it has no row: KL needs it. Raises ResourceError where memory runs out.
    """
    table = _Table(session, name, request, tokens, kept)
    arms = list(request.arms())
    if None not in arms:
        arms.insert(0, None)
    for number, quant in enumerate(arms, start=1):
        table.add(quant, text, f"{number}/{len(arms)}")
    if text is not None:
        for bits, group_size in product(request.bits, request.group_sizes):
            for peer in request.peers:
                table.add_peer(peer, replace(request.base, bits=bits, group_size=group_size), text)
    if kept is not None:
        kept.discard()
    return table.rows


class _Table:
    """The rows so far, and what the float model made of the text."""

    def __init__(
        self, session: Session, name: str, request: TableRequest, tokens: EvalTokens, kept: KeptRows | None
    ) -> None:
        self.session, self.name, self.request, self.tokens = session, name, request, tokens
        self.kept = kept
        self.rows: list[Row] = []
        self._float: tuple[PerplexityResult, Reference] | None = None

    def add(self, quant: QuantConfig | None, text: CalibrationSet | None, label: str) -> None:
        """The rows of one arm, one for each cache; None is the float model."""
        if quant is not None and self._take_kept(quant, label):
            return
        device = self.session.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        begin = time.monotonic()
        if quant is None:
            model, ranges = self._model(self.session.checkpoint), None
            seconds = 0.0
        else:
            made = quantize_in_memory(self.session, *self._arm(quant, text))
            model, ranges = self._model(made.checkpoint(self.session.checkpoint, quant)), made.ranges
            seconds = time.monotonic() - begin
        for kv_bits, kv_mode in self.request.kv:
            if kv_mode == "static" and ranges is None:
                continue
            result = self._judge(model, cache_of(kv_bits, kv_mode, ranges))
            if quant is not None or FLOAT in self.request.methods:
                row = self._row(quant, result, seconds)
                self.rows.append(row)
                if quant is not None and self.kept is not None:
                    self.kept.keep(quant, (kv_bits, kv_mode), row.to_json())
                self.session.progress.say(f"{label}  {row.key}: ppl {row.ppl:.3f}, {seconds:.0f} s")
        del model
        release(device)

    def _take_kept(self, quant: QuantConfig, label: str) -> bool:
        """Whether every row of the arm was finished by an earlier start, which are taken over then."""
        if self.kept is None:
            return False
        found = [self.kept.find(quant, cache) for cache in self.request.kv]
        rows = [row_of(fields) for fields in found if fields is not None]
        whole = [replace(row, model=self.name) for row in rows if row is not None]
        if len(whole) < len(found):
            return False
        self.rows += whole
        for row in whole:
            self.session.progress.say(f"{label}  {row.key}: ppl {row.ppl:.3f}, from an earlier start")
        return True

    def add_peer(self, peer: str, quant: QuantConfig, text: CalibrationSet) -> None:
        """The row of another quantizer on the same text, in our engine."""
        session = self.session
        with tempfile.TemporaryDirectory() as folder:
            seconds = quantize_with(
                peer, session.checkpoint.path, Path(folder), text.tokens, quant, session.device
            )
            model = self._model(open_checkpoint(folder))
        row = self._row(quant, self._judge(model, None), seconds)
        self.rows.append(replace(row, method=peer))
        session.progress.say(
            f"{peer} int{quant.bits} g{quant.group_size}: ppl {row.ppl:.3f}, {seconds:.0f} s"
        )
        del model
        release(session.device)

    def _arm(self, quant: QuantConfig, text: CalibrationSet | None) -> tuple[QuantConfig, CalibrationSource]:
        """The configuration and source of an arm. With a static cache it is what `quantize awq --kv-bits 8` does."""
        if needs_ranges(self.request):
            return replace(quant, kv_bits=8), source_of(text)
        return quant, source_of(text if quant.needs_text else None)

    def _model(self, ckpt: Checkpoint) -> Model:
        return Model.from_checkpoint(ckpt, self.session.device, self.session.dtype)

    def _judge(self, model: Model, kv: KVSimulation | None) -> PerplexityResult:
        reference = None if self._float is None else self._float[1]
        result, kept = judge(model, self.tokens, self.request.protocol, kv, reference)
        if self._float is None:
            self._float = result, kept
        return result

    def _row(self, quant: QuantConfig | None, result: PerplexityResult, seconds: float) -> Row:
        assert self._float is not None
        seed, device = self.request.base.seed, self.session.device
        return make_row(self.name, quant, seed, result, self._float[0], seconds, device)


def row_of(fields: dict[str, Any]) -> Row | None:
    """The row whose `to_json` these are; None where they are another version's."""
    try:
        row = Row(**fields)
    except TypeError:
        return None
    interval = row.ppl_diff_ci95
    return row if interval is None else replace(row, ppl_diff_ci95=(interval[0], interval[1]))


def needs_ranges(request: TableRequest) -> bool:
    """Whether a row has a static cache, whose parameters follow from the ranges of K and V."""
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
