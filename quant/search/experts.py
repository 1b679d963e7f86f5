"""Mixtures of experts: one channel scale from the norm that all experts read, then each expert on the tokens that reach it.

Routers and the gate of a shared expert read the same norm and stay float: their columns take the scale over. One expert at a
time is on the device. E experts, K in features, T tokens of the whole text, H hidden size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights
from convert.families.table import expert_roles
from engine.model.experts import route
from engine.model.ops import activate
from kernels.int4 import Quantized
from quant.search.block_search import BlockSearch
from quant.search.scale_and_clip import choose_scale, judged_by
from quant.search.scales.folding import Fold, fold_norm, no_fold, norm_fold, row_fold
from quant.search.stack import QuantizedStack, Stack
from quant.stage_clock import stage
from quant.statistics.chunked_block import ChunkedBlock, linear
from quant.statistics.gram import InputStatistics, observe

MIN_TOKENS = 64  # an expert that fewer tokens reach borrows its statistics from the whole layer
BORROWED_TOKENS = 4096  # of the layer, run through such an expert for what its down projection reads
SCALE_ROWS = 32768  # rows of all experts together on which their common scale is chosen
CHUNK = 32768  # tokens that go through an expert at once


@stage("quantized stream")
def quantize_experts(search: BlockSearch, chunked: ChunkedBlock, mid: Tensor) -> Tensor:
    """Gate, up and down of every expert and of the shared one; returns the sum of what they give (S, L, H)."""
    h = chunked.map(lambda part: chunked.read(part, search.source, "mlp_norm"), mid)
    layer = observe((h[part] for part in chunked.slices()), search.name("experts"))
    weights, chosen = _routes(chunked, h, search.source)
    fixed = _share_scale(search, layer)
    flat, out = h.flatten(0, 1), torch.zeros_like(h).flatten(0, 1)
    for expert in range(search.config.num_experts):
        tokens, place = torch.where(chosen == expert)
        given = _quantize_expert(search, f"experts.{expert}.", flat, tokens, layer, fixed)
        for at, result in given:
            rows = tokens[at]
            out.index_add_(0, rows, (result * weights[rows, place[at], None]).to(out.dtype))
    if search.config.shared_intermediate_size:
        everything = torch.arange(len(flat), device=flat.device)
        for at, result in _quantize_expert(search, "shared.", flat, everything, layer, fixed):
            out[at] += _shared_gate(search.source, flat[at]) * result
    return out.view(h.shape)


def _quantize_expert(
    search: BlockSearch, prefix: str, flat: Tensor, tokens: Tensor, layer: InputStatistics, fixed: Fold
) -> Iterable[tuple[slice, Tensor]]:
    """Search one expert on its tokens (indices into flat (T, H)); yields what it then gives them, chunk by chunk."""
    first, gate, up, down = len(search.reports), prefix + "gate", prefix + "up", prefix + "down"
    is_borrowed = len(tokens) < MIN_TOKENS
    seen = tokens
    if is_borrowed:
        seen = torch.linspace(0, len(flat) - 1, min(len(flat), BORROWED_TOKENS), device=flat.device).long()
    stats = layer
    if not is_borrowed and len(tokens) < len(flat):
        stats = observe((flat[part][None] for part in seen.split(CHUNK)), search.name(prefix + "inputs"))
    if search.fits(gate):
        dense = search.quantize((gate, up), stats, fixed).weight()
    else:
        dense = torch.cat([search.weight(gate), search.weight(up)])
    dense = dense.to(flat.dtype)

    def inner(part: Tensor) -> Tensor:
        rows = len(search.source.linears[gate].weight)
        x = flat[part]
        opened = activate(search.config.activation, linear(x, search.source.linears[gate], dense[:rows]))
        return opened * linear(x, search.source.linears[up], dense[rows:])

    source = search.source.linears[down]
    if search.fits(down):
        read = observe((inner(part)[None] for part in seen.split(CHUNK)), search.name(prefix + "down"))
        last = _quantize_down(search, prefix, read).weight().to(flat.dtype)
    else:
        last = search.weight(down).to(flat.dtype)
    _report_tokens(search, first, prefix, len(tokens))
    for start in range(0, len(tokens), CHUNK):
        at = slice(start, min(start + CHUNK, len(tokens)))
        yield at, linear(inner(tokens[at]), source, last)


def _quantize_down(search: BlockSearch, prefix: str, stats: InputStatistics) -> QuantizedStack:
    """One expert's down; its scales go into the rows of up, where that is searched too."""
    folds = search.fits(prefix + "up")
    fold = row_fold(search.weight(prefix + "up")) if folds else no_fold()
    solution = search.quantize((prefix + "down",), stats, fold)
    if folds:
        search.fold_back(prefix + "up", solution)
    return solution


def _report_tokens(search: BlockSearch, first: int, prefix: str, count: int) -> None:
    """The number of tokens in the reports from `first` on, and a warning where statistics were borrowed."""
    found = (
        "no token reaches"
        if not count
        else f"{count} token{'s' if count > 1 else ''} reach{'' if count > 1 else 'es'}"
    )
    borrowed = (
        (f"{found} this expert: its statistics are borrowed from the whole layer",)
        if count < MIN_TOKENS
        else ()
    )
    for k in range(first, len(search.reports)):
        report = search.reports[k]
        search.reports[k] = replace(
            report,
            warnings=(*report.warnings, *borrowed),
            values={**report.values, "tokens": float(count)},
        )


def experts_from_statistics(search: BlockSearch, saved: Mapping[str, InputStatistics]) -> None:
    """The same on saved statistics of the float stream, by name; an expert that no token reached has none."""
    layer = saved["mlp_in"].to(search.device)
    fixed = _share_scale(search, layer)
    prefixes = [f"experts.{e}." for e in range(search.config.num_experts)]
    counts = {prefix: _tokens(saved, prefix + "down_in") for prefix in [*prefixes, "shared."]}
    others = [prefix for prefix in prefixes if counts[prefix] >= MIN_TOKENS]
    borrowed = None
    if len(others) < len(prefixes):
        borrowed = _mean([saved[prefix + "down_in"] for prefix in others], search)
    for prefix in [*prefixes, *(["shared."] if search.config.shared_intermediate_size else [])]:
        first, is_own = len(search.reports), counts[prefix] >= MIN_TOKENS or prefix == "shared."
        own = saved[prefix + "in"].to(search.device) if is_own and prefix != "shared." else layer
        inner = saved[prefix + "down_in"].to(search.device) if is_own or borrowed is None else borrowed
        if search.fits(prefix + "gate"):
            search.quantize((prefix + "gate", prefix + "up"), own, fixed)
        if search.fits(prefix + "down"):
            _quantize_down(search, prefix, inner)
        _report_tokens(search, first, prefix, counts[prefix])


def _tokens(saved: Mapping[str, InputStatistics], name: str) -> int:
    return saved[name].tokens if name in saved else 0


def _mean(seen: list[InputStatistics], search: BlockSearch) -> InputStatistics:
    """Statistics of the layer's other experts, for those that too few tokens reach; of white noise where there is no other."""
    if not seen:
        size = search.config.expert_size
        gram = torch.eye(size, device=search.device)
        return InputStatistics(gram, gram, gram, torch.ones(size, device=search.device), 0)
    gram = torch.stack([part.gram for part in seen]).mean(0).to(search.device)
    mean_abs = torch.stack([part.mean_abs for part in seen]).mean(0).to(search.device)
    return InputStatistics(gram, gram, gram, mean_abs, sum(part.tokens for part in seen))


def _share_scale(search: BlockSearch, stats: InputStatistics) -> Fold:
    """Choose the norm's scale for all experts at once and fold it; returns the fold that holds it fixed."""
    norm, offset = search.source.norms.get("mlp_norm"), search.config.norm_offset
    readers = expert_roles(search.config, "gate", "up")
    if norm is None or not search.fits("experts.0.gate"):
        return no_fold()
    scale = torch.ones_like(norm)
    steps = search.steps(readers)
    if steps.scale:
        judged, fold = judged_by(stats, steps), norm_fold(norm, offset)
        scale = choose_scale(_sampled_stack(search), judged, fold, search.effort, search.quant)[0]
    search.put_norm("mlp_norm", fold_norm(norm, scale, offset))
    for role in ("router", "shared.router", *readers):
        part = search.weights.linears.get(role)
        if part is not None and not isinstance(part.weight, Quantized) and not search.fits(role):
            weight = part.weight.to(scale.device).float() * scale
            search.put(role, replace(part, weight=weight.to(part.weight.device)))
    return Fold(lambda value: value, lambda value: value, lambda value: scale.expand_as(value))


def _sampled_stack(search: BlockSearch) -> Stack:
    """Evenly spaced rows of the experts' gates as one linear, of their ups as another, and the shared expert's."""
    count = search.config.num_experts
    step = max(1, 2 * count * search.config.expert_size // SCALE_ROWS)
    roles, parts = [], []
    for kind in ("gate", "up"):
        rows = [search.weight(f"experts.{e}.{kind}")[e % step :: step] for e in range(count)]
        roles.append(f"experts.{kind}")
        parts.append(torch.cat(rows))
        if search.config.shared_intermediate_size:
            roles.append(f"shared.{kind}")
            parts.append(search.weight(f"shared.{kind}")[::step])
    return Stack(torch.cat(parts), tuple(roles), tuple(len(part) for part in parts))


def run_experts(chunked: ChunkedBlock, h: Tensor, block: BlockWeights) -> Tensor:
    """What the float experts give for hidden states h (S, L, H), one expert at a time on the device of h."""
    config = chunked.config
    weights, chosen = _routes(chunked, h, block)
    flat, out = h.flatten(0, 1), torch.zeros_like(h).flatten(0, 1)

    def run(prefix: str, tokens: Tensor) -> Tensor:
        gate, up, down = (
            chunked.dense(block, (prefix + part,)).linears[prefix + part] for part in ("gate", "up", "down")
        )
        assert isinstance(gate.weight, Tensor) and isinstance(up.weight, Tensor)
        assert isinstance(down.weight, Tensor)
        given = [flat.new_zeros(0, flat.shape[1])]
        for part in tokens.split(CHUNK):
            opened = activate(config.activation, linear(flat[part], gate, gate.weight))
            given.append(linear(opened * linear(flat[part], up, up.weight), down, down.weight))
        return torch.cat(given)

    for expert in range(config.num_experts):
        tokens, place = torch.where(chosen == expert)
        result = run(f"experts.{expert}.", tokens) * weights[tokens, place, None]
        out.index_add_(0, tokens, result.to(out.dtype))
    if config.shared_intermediate_size:
        result = run("shared.", torch.arange(len(flat), device=flat.device))
        out += _shared_gate(block, flat) * result
    return out.view(h.shape)


def _routes(chunked: ChunkedBlock, h: Tensor, block: BlockWeights) -> tuple[Tensor, Tensor]:
    """Weights (T, k) float32 and experts (T, k) of every token of h (S, L, H)."""
    router = block.linears["router"]
    assert isinstance(router.weight, Tensor)
    dtype = torch.float32 if chunked.config.router.scores == "sigmoid" else h.dtype
    weight, bias = router.weight.to(device=h.device, dtype=dtype), block.vectors.get("router_bias")
    bias = None if bias is None else bias.to(h.device)
    found = [
        route(linear(h[part].flatten(0, 1).to(dtype), router, weight), chunked.config, bias)
        for part in chunked.slices()
    ]
    return torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])


def _shared_gate(block: BlockWeights, x: Tensor) -> Tensor:
    """What the shared expert's output is multiplied by, (T, 1), for normed x (T, H)."""
    part = block.linears.get("shared.router")
    if part is None:
        return x.new_ones(len(x), 1)
    assert isinstance(part.weight, Tensor)
    return torch.sigmoid(linear(x, part, part.weight.to(x.device)))
