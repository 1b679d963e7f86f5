"""The linears of a block in the order of the forward pass, each on what the quantized ones before it make of the text.

S samples, L tokens a sample, H hidden size, N out features, K in features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.block import Tap
from quant.learn import rounding
from quant.records import BlockResult, Streams
from quant.search.block_search import BlockSearch
from quant.search.experts import quantize_experts
from quant.search.rounding.inherited import foretold
from quant.search.rounding.targets import CrossSums
from quant.search.scales.folding import Fold, fold_norm, kv_fold, no_fold, norm_fold, row_fold
from quant.search.stored import to_float16
from quant.stage_clock import stage
from quant.statistics.chunks import chunk_samples
from quant.statistics.gram import outer_sum
from quant.statistics.parts import Parts, linear


@dataclass
class _Float:
    """The float stream inside the block: what the linears read there and what they gave, (S, L, H) each."""

    attn_in: Tensor
    mid: Tensor
    mlp_in: Tensor
    out: Tensor


def search_on_streams(
    search: BlockSearch,
    inputs: Streams,
    tap: Tap | None,
    metric: Tensor | None,
) -> BlockResult:
    """Quantize the block on its two streams; learned rounding, where the plan has it, reads `metric` (H, H)."""
    x = inputs.quantized
    parts = Parts(search.config, x)
    keep_float = inputs.fp is not x
    reference = _float_stream(search, parts, inputs.fp) if keep_float else None
    mid = _attention(search, parts, x, reference)
    out = (
        quantize_experts(search, parts, mid)
        if search.config.num_experts
        else _mlp(search, parts, mid, reference)
    )
    done = to_float16(search.weights)
    if search.learning is not None and reference is not None:
        wanted = _wanted(search, parts, x, reference.out, search.learning.toward_float, metric)
        done, search.reports = rounding.learn_block(
            done,
            search.latents,
            search.config,
            search.quant,
            x,
            wanted,
            search.reports,
            search.learning,
            metric,
        )
        dense = parts.dense(done)
        out = parts.map(lambda h: parts.block(h, dense, tap), x)
    elif tap is not None:
        dense = parts.dense(done)
        for part in parts.slices():
            parts.mixed(parts.norm(x[part], done.norms["attn_norm"]), dense, tap)
    return BlockResult(done, tuple(search.reports), Streams(out if reference is None else reference.out, out))


@stage("target of learned rounding")
def _wanted(
    search: BlockSearch, parts: Parts, x: Tensor, out: Tensor, way: float, metric: Tensor | None
) -> Tensor:
    """What learned rounding aims at: the float stream after the block, or a share of the way there from what x foretells of it."""
    if way == 1:
        return out
    source = parts.dense(search.source)
    begin = parts.map(lambda h: parts.block(h, source), x)
    return torch.lerp(foretold(begin, x, out, metric, chunk_samples(x.shape[1], x.device)), out, way)


@stage("float stream")
def _float_stream(search: BlockSearch, parts: Parts, x: Tensor) -> _Float:
    source = parts.dense(search.source)
    attn_in = parts.map(lambda h: parts.norm(h, source.norms["attn_norm"]), x)
    mid = x + parts.map(lambda h: parts.attention(h, source), attn_in)
    mlp_in = parts.map(lambda h: parts.norm(h, source.norms["mlp_norm"]), mid)
    return _Float(attn_in, mid, mlp_in, mid + parts.map(lambda h: parts.mlp(h, source), mlp_in))


@stage("cross sums")
def _cross(
    search: BlockSearch,
    parts: Parts,
    roles: tuple[str, ...],
    x: Tensor,
    of_inputs: Tensor | None,
    of_outputs: Tensor | None,
) -> CrossSums | None:
    """C = (Y - X W^T)^T X / M with Y the float stream's outputs; from the difference of inputs, or of outputs."""
    if not search.steps(roles).toward_float or len(x) < 2:
        return None
    weight = torch.cat([search.weight(role) for role in roles])
    sums = [torch.zeros(1, device=search.device) for _ in range(2)]
    for part in parts.slices():
        for half in range(2):
            own = slice(part.start + (half + part.start) % 2, part.stop, 2)
            if own.start >= own.stop:
                continue
            now = x[own].flatten(0, 1)
            if of_inputs is not None:
                sums[half] = sums[half] + outer_sum(of_inputs[own].flatten(0, 1) - now, now)
            elif of_outputs is not None:
                given = linear(now, search.source.linears[roles[0]], weight)
                sums[half] = sums[half] + outer_sum(of_outputs[own].flatten(0, 1) - given, now)
    samples, length = x.shape[:2]
    halves = torch.stack([sums[0] / (samples - samples // 2), sums[1] / (samples // 2)]) / length
    return CrossSums(weight @ halves if of_inputs is not None else halves)


@stage("quantized stream")
def _attention(search: BlockSearch, parts: Parts, x: Tensor, reference: _Float | None) -> Tensor:
    """q, k, v, then o; returns the stream after the attention part."""
    h = _behind_norm(search, parts, ("q", "k", "v"), "attn_norm", x, reference.attn_in if reference else None)
    dense = parts.dense(search.weights)
    mixed = parts.map(lambda part: parts.mixed(part, dense), h)
    fold = kv_fold(search.weight("v"), search.config)
    return x + _last(search, parts, "o", "v", mixed, fold, reference.mid - x if reference else None)


@stage("quantized stream")
def _mlp(search: BlockSearch, parts: Parts, mid: Tensor, reference: _Float | None) -> Tensor:
    """gate, up, then down; returns the stream after the block."""
    h = _behind_norm(search, parts, ("gate", "up"), "mlp_norm", mid, reference.mlp_in if reference else None)
    dense = parts.dense(search.weights)
    inner = parts.map(lambda part: parts.gated(part, dense), h)
    fold = row_fold(search.weight("up"))
    return mid + _last(search, parts, "down", "up", inner, fold, reference.out - mid if reference else None)


def _behind_norm(
    search: BlockSearch,
    parts: Parts,
    roles: tuple[str, ...],
    norm_role: str,
    x: Tensor,
    wanted: Tensor | None,
) -> Tensor:
    """The linears that read a norm of the stream x: search them, fold their scales into it, return what they read then."""
    norm = search.weights.norms[norm_role]
    h = parts.map(lambda part: parts.norm(part, norm), x)
    if not all(search.fits(role) for role in roles):
        return h
    stats = search.observe(parts, h, ", ".join(roles))
    cross = _cross(search, parts, roles, h, wanted, None)
    solution = search.quantize(roles, stats, norm_fold(norm), cross)
    folded = fold_norm(norm, solution.channel_scale)
    search.put_norm(norm_role, folded)
    return parts.map(lambda part: parts.norm(part, folded), x)


def _last(
    search: BlockSearch,
    parts: Parts,
    role: str,
    before: str,
    inputs: Tensor,
    fold: Fold,
    wanted: Tensor | None,
) -> Tensor:
    """o or down: search it, fold its scales into the rows of `before`, return its product on these inputs."""
    source = search.source.linears[role]
    if not search.fits(role):
        return parts.map(lambda part: linear(part, source, search.weight(role)), inputs)
    folds = search.fits(before)  # what stays float is left as it is
    stats = search.observe(parts, inputs, role)
    cross = _cross(search, parts, (role,), inputs, None, wanted)
    solution = search.quantize((role,), stats, fold if folds else no_fold(), cross)
    if folds:
        search.fold_back(before, solution)
    dense = solution.weight().to(inputs.dtype)
    return parts.map(lambda part: linear(part, source, dense), inputs)
