"""Sequential search: the linears of a block in the order of the forward pass, each on what the quantized ones before it make of the text.

S samples, L tokens a sample, H hidden size, N out features, K in features. The text goes through a chunk at a time; of a whole
stream only hidden states are held, and what o or down reads where that is cheap to hold.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.block import Tap
from quant.block_states import QuantizedBlock
from quant.block_task import BlockResult, Streams
from quant.search.block_search import BlockSearch
from quant.search.experts import quantize_experts, run_experts
from quant.search.rounding.targets import CrossAccumulator, CrossSums
from quant.search.scales.folding import Fold, fold_norm, kv_fold, no_fold, norm_fold, row_fold
from quant.stage_clock import stage
from quant.statistics.chunked_block import ChunkedBlock, linear
from quant.statistics.gram import GramAccumulator, InputStatistics

Read = Callable[[slice], Tensor]  # samples -> what a linear reads of them


ATTENTION = ("q", "k", "v", "o")


@dataclass
class _FloatStream:
    """The float stream (S, L, H) after a half of the block; `product`, what its last linear gave, where a norm stands after it."""

    state: Tensor
    product: Tensor | None = None


def search_on_streams(search: BlockSearch, inputs: Streams, tap: Tap | None) -> BlockResult:
    """Quantize the block on its two streams; on one where both are the same tensor."""
    x = inputs.quantized
    chunked = ChunkedBlock(search.config, x)
    fp = None if inputs.fp is x else _float_attention(search, chunked, inputs.fp)
    mid = _attention(search, chunked, inputs, fp)
    if search.config.num_experts:
        if fp is not None:
            _float_mlp_(search, chunked, fp)
        given = quantize_experts(search, chunked, mid)
        out = _add(search, chunked, mid, "mlp_out_norm", lambda part: given[part], mid)
    else:
        out = _mlp(search, chunked, mid, fp)
    done = QuantizedBlock.of(search.weights)
    if tap is not None:
        dense = chunked.dense(done, ATTENTION)
        for part in chunked.slices():
            chunked.mixed(chunked.read(x[part], done, "attn_norm"), dense, tap)
    return BlockResult(done, tuple(search.reports), Streams(out if fp is None else fp.state, out))


@stage("float stream")
def _float_attention(search: BlockSearch, chunked: ChunkedBlock, fp: Tensor) -> _FloatStream:
    """The float stream after the attention part: a new tensor."""
    source = chunked.dense(search.source, ATTENTION)
    found = _FloatStream(torch.empty_like(fp))
    found.product = torch.empty_like(fp) if "attn_out_norm" in source.norms else None
    for part in chunked.slices():
        out = chunked.attention(chunked.read(fp[part], source, "attn_norm"), source)
        found.state[part] = fp[part] + chunked.added(out, source, "attn_out_norm")
        if found.product is not None:
            found.product[part] = out
    return found


@stage("float stream")
def _float_mlp_(search: BlockSearch, chunked: ChunkedBlock, fp: _FloatStream) -> None:
    """The float stream after the attention part becomes the one after the block, in place."""
    state, source = fp.state, search.source
    if search.config.num_experts:
        given = run_experts(
            chunked, chunked.map(lambda part: chunked.read(part, source, "mlp_norm"), state), source
        )
        for part in chunked.slices():
            state[part] += chunked.added(given[part], source, "mlp_out_norm")
        return
    dense = chunked.dense(source)
    for part in chunked.slices():
        out = chunked.mlp(chunked.read(state[part], source, "mlp_norm"), dense)
        state[part] += chunked.added(out, source, "mlp_out_norm")
        if fp.product is not None:
            fp.product[part] = out


@stage("quantized stream")
def _attention(
    search: BlockSearch, chunked: ChunkedBlock, inputs: Streams, fp: _FloatStream | None
) -> Tensor:
    """q, k, v, then o; returns the stream after the attention part. fp: the float stream there."""
    x = inputs.quantized
    _search_after_norm(search, chunked, ("q", "k", "v"), "attn_norm", x, None if fp is None else inputs.fp)
    weights, dense = search.weights, chunked.dense(search.weights, ATTENTION)
    fold = kv_fold(search.weight("v"), search.config)

    def read(part: slice) -> Tensor:
        return chunked.mixed(chunked.read(x[part], weights, "attn_norm"), dense)

    return _search_last(search, chunked, ("o", "v", "attn_out_norm"), fold, read, x, fp, torch.empty_like(x))


@stage("quantized stream")
def _mlp(search: BlockSearch, chunked: ChunkedBlock, mid: Tensor, fp: _FloatStream | None) -> Tensor:
    """gate, up, then down; returns the stream after the block, to which fp, the float stream, moves on as well."""
    _search_after_norm(search, chunked, ("gate", "up"), "mlp_norm", mid, None if fp is None else fp.state)
    if fp is not None:
        _float_mlp_(search, chunked, fp)
    weights, dense = search.weights, chunked.dense(search.weights)
    fold = row_fold(search.weight("up"))

    def read(part: slice) -> Tensor:
        return chunked.gated(chunked.read(mid[part], weights, "mlp_norm"), dense)

    return _search_last(search, chunked, ("down", "up", "mlp_out_norm"), fold, read, mid, fp, mid)


def _search_after_norm(
    search: BlockSearch,
    chunked: ChunkedBlock,
    roles: tuple[str, ...],
    norm_role: str,
    x: Tensor,
    fp: Tensor | None,
) -> None:
    """Search the linears that read the stream x, and fold their scales into the norm before them, where there is one."""
    if not all(search.fits(role) for role in roles):
        return
    weights = search.weights
    sums, cross = GramAccumulator(x.shape[-1], x.device, hold_out=True), _cross(search, roles, fp)
    for part in chunked.slices():
        h = chunked.read(x[part], weights, norm_role)
        with stage("Gram matrices"):
            sums.add(h)
        if cross is not None and fp is not None:
            with stage("cross sums"):
                cross.add(part.start, h, chunked.read(fp[part], weights, norm_role))
    weight = None if cross is None else torch.cat([search.weight(role) for role in roles])
    stats, missing = _finished(search, ", ".join(roles), sums, cross, weight)
    norm, offset = weights.norms.get(norm_role), search.config.norm_offset
    fold = no_fold() if norm is None else norm_fold(norm, offset)
    solution = search.quantize(roles, stats, fold, missing)
    if norm is not None:
        search.put_norm(norm_role, fold_norm(norm, solution.channel_scale, offset))


def _search_last(
    search: BlockSearch,
    chunked: ChunkedBlock,
    roles: tuple[str, str, str],
    fold: Fold,
    read: Read,
    x: Tensor,
    fp: _FloatStream | None,
    out: Tensor,
) -> Tensor:
    """o or down: search it, fold its scales into the rows of the linear before it; returns x with its product added, (S, L, H).

    roles: of the linear, of the one before it, and of the norm after it. x: the quantized stream before this part of the block.
    fp: the float stream after it. out: what the result is written to; x itself where nothing else needs it.
    """
    role, before, norm_role = roles
    source = search.source.linears[role]
    if not search.fits(role):
        weight = search.weight(role)
        return _add(search, chunked, x, norm_role, lambda part: linear(read(part), source, weight), out)
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
                aim = _aim(search, fp, x, part)
                cross.add(part.start, inputs, aim, lambda now: linear(now, source, dense))
    stats, missing = _finished(search, role, sums, cross, None)
    folds = search.fits(before)  # what stays float is left as it is
    solution = search.quantize((role,), stats, fold if folds else no_fold(), missing)
    if folds:
        search.fold_back(before, solution)
    dense = solution.weight().to(x.dtype)
    return _add(search, chunked, x, norm_role, lambda part: linear(read(part), source, dense), out)


def _aim(search: BlockSearch, fp: _FloatStream, x: Tensor, part: slice) -> Tensor:
    """What the last linear of a half should give for these samples: what leads from x to the float stream after the half.

    Through a norm no sum leads there: what the float model's linear gives.
    """
    if fp.product is not None:
        return fp.product[part]
    gap = fp.state[part] - x[part]
    return gap if search.config.residual_scale == 1.0 else gap / search.config.residual_scale


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


def _add(
    search: BlockSearch, chunked: ChunkedBlock, x: Tensor, norm_role: str, product: Read, out: Tensor
) -> Tensor:
    """x and what a half of the block adds to it for this product of every chunk, written to `out`, which may be x."""
    for part in chunked.slices():
        out[part] = x[part] + chunked.added(product(part), search.weights, norm_role)
    return out


def _cross(search: BlockSearch, roles: tuple[str, ...], fp: object | None) -> CrossAccumulator | None:
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
