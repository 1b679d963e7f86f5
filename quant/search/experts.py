"""Mixtral's experts: one channel scale from the shared norm, then each expert on the tokens that are routed to it.

The router reads the same norm and stays float: its columns take the scale over. E experts, K in features.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from quant.search.block_search import BlockSearch
from quant.search.scale_and_clip import choose_scale, judged_by
from quant.search.scales.folding import Fold, fold_norm, no_fold, norm_fold, row_fold
from quant.stage_clock import stage
from quant.statistics.chunked_block import ChunkedBlock
from quant.statistics.gram import InputStatistics, observe

MIN_TOKENS = 64  # an expert that fewer tokens reach is searched on all of them


@stage("quantized stream")
def quantize_experts(search: BlockSearch, chunked: ChunkedBlock, mid: Tensor) -> Tensor:
    """Gate, up and down of every expert, where they become integers; returns the stream after the block."""
    norm = search.weights.norms["mlp_norm"]
    h = chunked.map(lambda part: chunked.norm(part, norm), mid)
    if search.fits("experts.0.gate"):
        shared = observe((h[part] for part in chunked.slices()), search.name("experts"))
        fixed = _share_scale(search, shared, norm)
        h = chunked.map(lambda part: chunked.norm(part, search.weights.norms["mlp_norm"]), mid)
        column_scale = fixed.spread(fixed.snap(shared.mean_abs))
        seen = _expert_inputs(search, chunked, h, "in")
        for expert in range(search.config.num_experts):
            name = f"experts.{expert}."
            stats = _scaled(_stats_or(seen.get(expert), search, name, None), column_scale) or shared
            search.quantize((name + "gate", name + "up"), stats, fixed)
    if search.fits("experts.0.down"):
        seen = _expert_inputs(search, chunked, h, "down_in")
        for expert in range(search.config.num_experts):
            name = f"experts.{expert}."
            cols = search.source.linears[name + "down"].weight.shape[1]
            inner = _stats_or(seen.get(expert), search, name, cols)
            assert inner is not None
            _quantize_down(search, name, inner)
    dense = chunked.dense(search.weights)
    return mid + chunked.map(lambda part: chunked.mlp(part, dense), h)


def _quantize_down(search: BlockSearch, name: str, stats: InputStatistics) -> None:
    """One expert's down; its scales go into the rows of up, where that is searched too."""
    folds = search.fits(name + "up")
    fold = row_fold(search.weight(name + "up")) if folds else no_fold()
    solution = search.quantize((name + "down",), stats, fold)
    if folds:
        search.fold_back(name + "up", solution)


def experts_from_statistics(search: BlockSearch, stats: Callable[[str], InputStatistics]) -> None:
    """The same on saved statistics of the float stream."""
    gates, downs = (search.fits(f"experts.0.{part}") for part in ("gate", "down"))
    shared = stats("mlp_in")
    fixed = _share_scale(search, shared, search.source.norms["mlp_norm"]) if gates else None
    for expert in range(search.config.num_experts):
        name = f"experts.{expert}."
        if fixed is not None:
            own = stats(name + "in")
            search.quantize((name + "gate", name + "up"), own if own.tokens >= MIN_TOKENS else shared, fixed)
        if downs:
            _quantize_down(search, name, stats(name + "down_in"))


def _share_scale(search: BlockSearch, stats: InputStatistics, norm: Tensor) -> Fold:
    """Choose the norm's scale for all experts at once and fold it; returns the fold that holds it fixed."""
    roles = tuple(f"experts.{e}.{part}" for e in range(search.config.num_experts) for part in ("gate", "up"))
    fold = norm_fold(norm)
    scale = torch.ones_like(norm)
    steps = search.steps(roles)
    if steps.scale:
        judged = judged_by(stats, steps)
        scale = choose_scale(search.stack(roles), judged, fold, search.effort, search.quant)[0]
    search.put_norm("mlp_norm", fold_norm(norm, scale))
    router = search.source.linears["router"]
    search.put("router", replace(router, weight=router.weight.float() * scale))
    return Fold(lambda value: value, lambda value: value, lambda value: scale.expand_as(value))


def _expert_inputs(
    search: BlockSearch, chunked: ChunkedBlock, h: Tensor, what: str
) -> dict[int, list[Tensor]]:
    """What reaches each expert, by expert, in chunks of (tokens, K)."""
    dense, seen = chunked.dense(search.weights), dict[int, list[Tensor]]()
    ending = "." + what

    def tap(name: str, value: Tensor) -> None:
        if name.startswith("experts.") and name.endswith(ending):
            seen.setdefault(int(name.split(".")[1]), []).append(value)

    for part in chunked.slices():
        chunked.mlp(h[part], dense, tap)
    return seen


def _stats_or(
    chunks: list[Tensor] | None, search: BlockSearch, name: str, cols: int | None
) -> InputStatistics | None:
    """Statistics of an expert's own tokens; with too few of them none, or, where cols is given, those of white noise."""
    count = sum(len(chunk) for chunk in chunks or ())
    if chunks and count >= MIN_TOKENS:
        return observe((chunk[None] for chunk in chunks), search.name(name + "inputs"))
    if cols is None:
        return None
    gram = torch.eye(cols, device=search.device)
    return InputStatistics(gram, gram, gram, torch.ones(cols, device=search.device), count)


def _scaled(stats: InputStatistics | None, column_scale: Tensor) -> InputStatistics | None:
    """Statistics of inputs that a folded norm has divided by column_scale, as they were before."""
    if stats is None:
        return None
    outer = column_scale[:, None] * column_scale
    return replace(
        stats,
        gram=stats.gram * outer,
        fit=stats.fit * outer,
        hold=stats.hold * outer,
        mean_abs=stats.mean_abs * column_scale,
    )
