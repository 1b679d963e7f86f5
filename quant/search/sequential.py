"""Sequential search: the linears of a block in the order of the forward pass, each on what the quantized ones before it make of the text.

S samples, L tokens a sample, H hidden size, N out features, K in features. The text goes through a chunk at a time; of a whole
stream only hidden states are held, and what o or down reads where that is cheap to hold.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.model.block import Tap
from quant.block_states import QuantizedBlock
from quant.block_task import BlockResult, Streams
from quant.search.block_search import BlockSearch
from quant.search.experts import quantize_experts
from quant.search.rounding.targets import CrossAccumulator, CrossSums
from quant.search.scales.folding import Fold, fold_norm, kv_fold, no_fold, norm_fold, row_fold
from quant.stage_clock import stage
from quant.statistics.chunked_block import ChunkedBlock, linear
from quant.statistics.gram import GramAccumulator, InputStatistics

Read = Callable[[slice], Tensor]  # samples -> what a linear reads of them


def search_on_streams(search: BlockSearch, inputs: Streams, tap: Tap | None) -> BlockResult:
    """Quantize the block on its two streams; on one where both are the same tensor."""
    x = inputs.quantized
    chunked = ChunkedBlock(search.config, x)
    fp = None if inputs.fp is x else _float_attention(search, chunked, inputs.fp)
    mid = _attention(search, chunked, inputs, fp)
    if search.config.num_experts:
        if fp is not None:
            _float_mlp_(search, chunked, fp)
        out = quantize_experts(search, chunked, mid)
    else:
        out = _mlp(search, chunked, mid, fp)
    done = QuantizedBlock.of(search.weights)
    if tap is not None:
        dense = chunked.dense(done)
        for part in chunked.slices():
            chunked.mixed(chunked.norm(x[part], done.norms["attn_norm"]), dense, tap)
    return BlockResult(done, tuple(search.reports), Streams(out if fp is None else fp, out))


@stage("float stream")
def _float_attention(search: BlockSearch, chunked: ChunkedBlock, fp: Tensor) -> Tensor:
    """The float stream after the attention part: (S, L, H), a new tensor."""
    source, out = chunked.dense(search.source), torch.empty_like(fp)
    for part in chunked.slices():
        h = chunked.norm(fp[part], source.norms["attn_norm"])
        out[part] = fp[part] + chunked.attention(h, source)
    return out


@stage("float stream")
def _float_mlp_(search: BlockSearch, chunked: ChunkedBlock, fp: Tensor) -> None:
    """The float stream after the attention part becomes the one after the block, in place."""
    source = chunked.dense(search.source)
    for part in chunked.slices():
        fp[part] += chunked.mlp(chunked.norm(fp[part], source.norms["mlp_norm"]), source)


@stage("quantized stream")
def _attention(search: BlockSearch, chunked: ChunkedBlock, inputs: Streams, fp: Tensor | None) -> Tensor:
    """q, k, v, then o; returns the stream after the attention part. fp: the float stream there."""
    x = inputs.quantized
    _search_after_norm(search, chunked, ("q", "k", "v"), "attn_norm", x, None if fp is None else inputs.fp)
    norm, dense = search.weights.norms["attn_norm"], chunked.dense(search.weights)
    fold = kv_fold(search.weight("v"), search.config)
    return _search_last(
        search, chunked, "o", "v", fold, lambda part: chunked.mixed(chunked.norm(x[part], norm), dense), x, fp
    )


@stage("quantized stream")
def _mlp(search: BlockSearch, chunked: ChunkedBlock, mid: Tensor, fp: Tensor | None) -> Tensor:
    """gate, up, then down; returns the stream after the block, to which fp, the float stream, moves on as well."""
    _search_after_norm(search, chunked, ("gate", "up"), "mlp_norm", mid, fp)
    if fp is not None:
        _float_mlp_(search, chunked, fp)
    norm, dense = search.weights.norms["mlp_norm"], chunked.dense(search.weights)
    fold = row_fold(search.weight("up"))
    return _search_last(
        search,
        chunked,
        "down",
        "up",
        fold,
        lambda part: chunked.gated(chunked.norm(mid[part], norm), dense),
        mid,
        fp,
    )


def _search_after_norm(
    search: BlockSearch,
    chunked: ChunkedBlock,
    roles: tuple[str, ...],
    norm_role: str,
    x: Tensor,
    fp: Tensor | None,
) -> None:
    """Search the linears that read a norm of the stream x, and fold their scales into it."""
    if not all(search.fits(role) for role in roles):
        return
    norm = search.weights.norms[norm_role]
    sums, cross = GramAccumulator(x.shape[-1], x.device, hold_out=True), _cross(search, roles, fp)
    for part in chunked.slices():
        h = chunked.norm(x[part], norm)
        with stage("Gram matrices"):
            sums.add(h)
        if cross is not None and fp is not None:
            with stage("cross sums"):
                cross.add(part.start, h, chunked.norm(fp[part], norm))
    weight = None if cross is None else torch.cat([search.weight(role) for role in roles])
    stats, missing = _finished(search, ", ".join(roles), sums, cross, weight)
    solution = search.quantize(roles, stats, norm_fold(norm), missing)
    search.put_norm(norm_role, fold_norm(norm, solution.channel_scale))


def _search_last(
    search: BlockSearch,
    chunked: ChunkedBlock,
    role: str,
    before: str,
    fold: Fold,
    read: Read,
    x: Tensor,
    fp: Tensor | None,
) -> Tensor:
    """o or down: search it, fold its scales into the rows of `before`; returns x with its product added, (S, L, H).

    x, fp: the quantized stream before this part of the block, the float stream after it.
    """
    source = search.source.linears[role]
    if not search.fits(role):
        return _added(chunked, x, lambda part: linear(read(part), source, search.weight(role)))
    sums = GramAccumulator(source.weight.shape[1], x.device, hold_out=True)
    cross = _cross(search, (role,), fp)
    dense = search.weight(role).to(x.dtype)
    read = _held(read, x, source.weight.shape[1])
    for part in chunked.slices():
        inputs = read(part)
        with stage("Gram matrices"):
            sums.add(inputs)
        if cross is not None and fp is not None:
            with stage("cross sums"):
                cross.add(part.start, inputs, fp[part] - x[part], lambda now: linear(now, source, dense))
    stats, missing = _finished(search, role, sums, cross, None)
    folds = search.fits(before)  # what stays float is left as it is
    solution = search.quantize((role,), stats, fold if folds else no_fold(), missing)
    if folds:
        search.fold_back(before, solution)
    dense = solution.weight().to(x.dtype)
    return _added(chunked, x, lambda part: linear(read(part), source, dense))


def _held(read: Read, x: Tensor, width: int) -> Read:
    """The same, held from the first time to the second where it is no wider than the stream, and always on a CPU, where time is
    dearer than memory."""
    if x.device.type != "cpu" and width > x.shape[-1]:
        return read
    held: dict[int, Tensor] = {}

    def once(part: slice) -> Tensor:
        if part.start in held:
            return held.pop(part.start)
        held[part.start] = read(part)
        return held[part.start]

    return once


def _added(chunked: ChunkedBlock, x: Tensor, product: Read) -> Tensor:
    """x + product of every chunk, a new tensor."""
    out = torch.empty_like(x)
    for part in chunked.slices():
        out[part] = x[part] + product(part)
    return out


def _cross(search: BlockSearch, roles: tuple[str, ...], fp: Tensor | None) -> CrossAccumulator | None:
    """Where the targets of these linears move toward the float stream: what to add it up in."""
    return CrossAccumulator() if fp is not None and search.steps(roles).toward_float else None


def _finished(
    search: BlockSearch,
    what: str,
    sums: GramAccumulator,
    cross: CrossAccumulator | None,
    weight: Tensor | None,
) -> tuple[InputStatistics, CrossSums | None]:
    with stage("cross sums"):
        missing = None if cross is None else cross.sums(weight)
    with stage("Gram matrices"):
        return sums.statistics(search.name(what)), missing
