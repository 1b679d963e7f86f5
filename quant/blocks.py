"""One decoder block through the search: linears in the order of the forward pass, each on what the quantized ones before
it make of the text. Pure: weights, streams and configuration in; weights, reports and streams out. No I/O.

S samples, L tokens a sample, H hidden size, N out features, K in features.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import ModelConfig
from convert.errors import InputError
from engine.block import Tap
from kernels.int4 import Quantized, quantize
from quant.config import QuantConfig
from quant.folding import Fold, fold_norm, fold_rows, kv_fold, no_fold, norm_fold, row_fold
from quant.gram import InputStats, from_sums, observe, outer_sum
from quant.parts import Parts, linear
from quant.presets import PLANS, Plan, effort_on
from quant.records import BlockResult, GramStatistics, LinearReport, Streams
from quant.solve import Solution, Stack, free_codes, solve


def quantize_block(
    weights: BlockWeights,
    config: ModelConfig,
    quant: QuantConfig,
    inputs: Streams | GramStatistics | None,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    tap: Tap | None = None,
    metric: Tensor | None = None,
) -> BlockResult:
    """Quantize the linears of one block.

    Args:
        inputs: hidden states before the block; statistics of the float stream for `fast` alone; None for `rtn`.
        dtype: of the forward passes; the search itself computes in float32.
        metric: (H, H), what errors of the block's output cost (`measure_sensitivity`); `best` alone reads it; None: the same.
        tap: sees "k" and "v" of the quantized block, for KV parameters.

    Returns linears as Quantized with folded norms, float16 throughout (a router and, with `keep_ragged`, linears whose K
    is no multiple of the group stay float), a report for each linear, and the streams after the block. Where a preset
    does not look at the float stream and both streams came in as one tensor, one tensor comes back.
    Raises InputError for weights or activations that are not finite and for K that is no multiple of the group.
    """
    _check(weights, quant)
    if quant.preset == "rtn":
        return _rounded(weights, config, quant, inputs, device, dtype, tap)
    walk = Walk(weights, config, quant, torch.device(device), dtype)
    if isinstance(inputs, GramStatistics):
        if quant.preset != "fast":
            raise InputError(
                f"The preset {quant.preset} needs the calibration text itself: only fast searches on statistics."
            )
        return walk.from_statistics(inputs)
    if inputs is None:
        raise InputError(f"The preset {quant.preset} needs calibration text.")
    if quant.preset == "awq":
        from quant.awq_published import quantize_published

        return quantize_published(walk.weights, config, quant, inputs, tap)
    return walk.run(inputs, tap, metric)


def _check(weights: BlockWeights, quant: QuantConfig) -> None:
    for role, part in weights.linears.items():
        weight = part.weight
        if isinstance(weight, Quantized):
            raise InputError(
                f"Block {weights.index}, {role} is quantized already: start from the float checkpoint."
            )
        bad = int((~weight.isfinite()).sum())
        if bad:
            raise InputError(
                f"Block {weights.index}, {role}: {bad} weights are NaN or infinite. The checkpoint is damaged."
            )
        if role != "router" and weight.shape[1] % quant.group_size and not quant.keep_ragged:
            raise InputError(
                f"Block {weights.index}, {role}: K = {weight.shape[1]} is no multiple of the group size {quant.group_size}. "
                "Choose a smaller --group-size, --pad for exact zero-padding, or --keep-ragged to leave it in float16."
            )


def _is_quantized(weights: BlockWeights, role: str, quant: QuantConfig) -> bool:
    return role != "router" and weights.linears[role].weight.shape[1] % quant.group_size == 0


def to_float16(weights: BlockWeights) -> BlockWeights:
    """Norms, biases and what stays float, in fp16 as the packed checkpoint holds them."""
    linears = {
        role: LinearWeights(
            part.weight if isinstance(part.weight, Quantized) else part.weight.half(),
            None if part.bias is None else part.bias.half(),
        )
        for role, part in weights.linears.items()
    }
    return replace(
        weights, linears=linears, norms={role: norm.half() for role, norm in weights.norms.items()}
    )


def _rounded(
    weights: BlockWeights,
    config: ModelConfig,
    quant: QuantConfig,
    inputs: Streams | GramStatistics | None,
    device: torch.device | str,
    dtype: torch.dtype,
    tap: Tap | None,
) -> BlockResult:
    linears, reports = dict(weights.linears), []
    for role, part in weights.linears.items():
        if not _is_quantized(weights, role, quant) or isinstance(part.weight, Quantized):
            continue
        weight = part.weight.to(device).float()
        quantized = quantize(weight, quant.bits, quant.group_size)
        linears[role] = replace(part, weight=quantized)
        loss = float((quantized.dequantize() - weight).double().pow(2).sum())  # inputs of unit covariance
        reports.append(LinearReport(role, quantized.shape, loss, loss, loss))
    done = to_float16(replace(weights, linears=linears))
    streams = None
    if isinstance(inputs, Streams):
        parts = Parts(config, inputs.quantized)
        dense, source = parts.dense(done), parts.dense(weights)
        out = parts.map(lambda x: parts.block(x, dense, tap), inputs.quantized)
        streams = _paired(inputs, out, lambda: parts.map(lambda x: parts.block(x, source), inputs.fp))
    return BlockResult(done, tuple(reports), streams)


def _paired(inputs: Streams, quantized: Tensor, forward: Callable[[], Tensor]) -> Streams:
    """Streams after a block; the float one is only computed where it was kept apart."""
    return Streams(quantized if inputs.fp is inputs.quantized else forward(), quantized)


@dataclass
class _Float:
    """The float stream inside the block: what the linears read there and what they gave, (S, L, H) each."""

    attn_in: Tensor
    mid: Tensor
    mlp_in: Tensor
    out: Tensor


class Walk:
    """The state of one block on its way through the search."""

    def __init__(
        self,
        weights: BlockWeights,
        config: ModelConfig,
        quant: QuantConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        to = {role: _move(part, device) for role, part in weights.linears.items()}
        norms = {role: norm.to(device).float() for role, norm in weights.norms.items()}
        self.weights = replace(weights, linears=to, norms=norms)
        self.source = self.weights
        self.config, self.quant, self.device, self.dtype = config, quant, device, dtype
        self.plan: Plan = PLANS.get(quant.preset, Plan())
        self.effort = effort_on(device)
        self.reports: list[LinearReport] = []
        self.latents: dict[str, Tensor] = {}  # by role: centred codes as they would be if they were free

    # -- the pieces of every walk

    def weight(self, role: str) -> Tensor:
        """The float weight (N, K) of the source, float32."""
        weight = self.source.linears[role].weight
        assert isinstance(weight, Tensor)
        return weight.float()

    def stack(self, roles: tuple[str, ...]) -> Stack:
        parts = [self.weight(role) for role in roles]
        return Stack(torch.cat(parts), roles, tuple(len(part) for part in parts))

    def search(
        self, roles: tuple[str, ...], stats: InputStats, fold: Fold, cross: Tensor | None = None
    ) -> Solution:
        """Quantize linears that read one input, put them in place; the fold is the caller's."""
        stack = self.stack(roles)
        solution, reports = solve(stack, stats, fold, self.plan, self.effort, self.quant, cross)
        self.reports += reports
        latent = free_codes(solution, stack.weight, stats) if self.plan.learn else None
        start = 0
        for role, rows in zip(roles, stack.rows, strict=True):
            if latent is not None:
                self.latents[role] = latent[start : start + rows]
            quantized = solution.quantized(slice(start, start + rows), self.quant.group_size, self.quant.bits)
            self.put(role, replace(self.weights.linears[role], weight=quantized))
            start += rows
        return solution

    def observe(self, parts: Parts, inputs: Tensor, what: str) -> InputStats:
        """Statistics of a linear's inputs (S, L, K)."""
        return observe((inputs[part] for part in parts.slices()), self.name(what))

    def put(self, role: str, part: LinearWeights) -> None:
        self.weights = replace(self.weights, linears={**self.weights.linears, role: part})

    def put_norm(self, role: str, norm: Tensor) -> None:
        self.weights = replace(self.weights, norms={**self.weights.norms, role: norm})

    def fold_back(self, role: str, solution: Solution) -> None:
        """The channel scales of a linear into the rows of the linear before it."""
        self.put(role, fold_rows(self.weights.linears[role], solution.channel_scale))

    def name(self, what: str) -> str:
        return f"Block {self.weights.index}, {what}"

    # -- on streams

    def run(self, inputs: Streams, tap: Tap | None, metric: Tensor | None) -> BlockResult:
        x = inputs.quantized
        parts = Parts(self.config, x)
        keep_float = inputs.fp is not x
        reference = self._float_stream(parts, inputs.fp) if keep_float else None
        mid = self._attention(parts, x, reference)
        out = self._experts(parts, mid) if self.config.num_experts else self._mlp(parts, mid, reference)
        done = to_float16(self.weights)
        if self.plan.learn and reference is not None:
            from quant.rounding import learn_block

            done, self.reports = learn_block(
                done, self.latents, self.config, self.quant, x, reference.out, self.reports, metric
            )
            dense = parts.dense(done)
            out = parts.map(lambda h: parts.block(h, dense, tap), x)
        elif tap is not None:
            dense = parts.dense(done)
            for part in parts.slices():
                parts.mixed(parts.norm(x[part], done.norms["attn_norm"]), dense, tap)
        return BlockResult(
            done, tuple(self.reports), Streams(out if reference is None else reference.out, out)
        )

    def _float_stream(self, parts: Parts, x: Tensor) -> _Float:
        source = parts.dense(self.source)
        attn_in = parts.map(lambda h: parts.norm(h, source.norms["attn_norm"]), x)
        mid = x + parts.map(lambda h: parts.attention(h, source), attn_in)
        mlp_in = parts.map(lambda h: parts.norm(h, source.norms["mlp_norm"]), mid)
        return _Float(attn_in, mid, mlp_in, mid + parts.map(lambda h: parts.mlp(h, source), mlp_in))

    def _cross(
        self,
        parts: Parts,
        roles: tuple[str, ...],
        x: Tensor,
        of_inputs: Tensor | None,
        of_outputs: Tensor | None,
    ) -> Tensor | None:
        """(Y - X W^T)^T X / M with Y the float stream's outputs; from the difference of inputs, or of outputs."""
        if not self.plan.toward_float:
            return None
        weight = torch.cat([self.weight(role) for role in roles])
        total = torch.zeros(1, device=self.device)
        for part in parts.slices():
            now = x[part].flatten(0, 1)
            if of_inputs is not None:
                total = total + outer_sum(of_inputs[part].flatten(0, 1) - now, now)
            elif of_outputs is not None:
                given = linear(now, self.source.linears[roles[0]], weight)
                total = total + outer_sum(of_outputs[part].flatten(0, 1) - given, now)
        total = total / (x.shape[0] * x.shape[1])
        return weight @ total if of_inputs is not None else total

    def _attention(self, parts: Parts, x: Tensor, reference: _Float | None) -> Tensor:
        """q, k, v, then o; returns the stream after the attention part."""
        norm = self.weights.norms["attn_norm"]
        h = parts.map(lambda part: parts.norm(part, norm), x)
        roles = ("q", "k", "v")
        if all(_is_quantized(self.source, role, self.quant) for role in roles):
            stats = self.observe(parts, h, "q, k, v")
            cross = self._cross(parts, roles, h, reference.attn_in if reference else None, None)
            solution = self.search(roles, stats, norm_fold(norm), cross)
            self.put_norm("attn_norm", fold_norm(norm, solution.channel_scale))
            h = parts.map(lambda part: parts.norm(part, self.weights.norms["attn_norm"]), x)
        dense = parts.dense(self.weights)
        mixed = parts.map(lambda part: parts.mixed(part, dense), h)
        return x + self._last(
            parts,
            "o",
            "v",
            mixed,
            kv_fold(self.weight("v"), self.config),
            reference.mid - x if reference else None,
        )

    def _mlp(self, parts: Parts, mid: Tensor, reference: _Float | None) -> Tensor:
        norm = self.weights.norms["mlp_norm"]
        h = parts.map(lambda part: parts.norm(part, norm), mid)
        roles = ("gate", "up")
        if all(_is_quantized(self.source, role, self.quant) for role in roles):
            stats = self.observe(parts, h, "gate, up")
            cross = self._cross(parts, roles, h, reference.mlp_in if reference else None, None)
            solution = self.search(roles, stats, norm_fold(norm), cross)
            self.put_norm("mlp_norm", fold_norm(norm, solution.channel_scale))
            h = parts.map(lambda part: parts.norm(part, self.weights.norms["mlp_norm"]), mid)
        dense = parts.dense(self.weights)
        inner = parts.map(lambda part: parts.gated(part, dense), h)
        return mid + self._last(
            parts,
            "down",
            "up",
            inner,
            row_fold(self.weight("up")),
            reference.out - mid if reference else None,
        )

    def _last(
        self, parts: Parts, role: str, before: str, inputs: Tensor, fold: Fold, wanted: Tensor | None
    ) -> Tensor:
        """o or down: search it, fold its scales into the rows of `before`, return its product on these inputs."""
        source = self.source.linears[role]
        if not _is_quantized(self.source, role, self.quant):
            return parts.map(lambda part: linear(part, source, self.weight(role)), inputs)
        if not _is_quantized(self.source, before, self.quant):
            fold = no_fold()
        stats = self.observe(parts, inputs, role)
        cross = self._cross(parts, (role,), inputs, None, wanted)
        solution = self.search((role,), stats, fold, cross)
        self.fold_back(before, solution)
        dense = solution.weight().to(inputs.dtype)
        return parts.map(lambda part: linear(part, source, dense), inputs)

    def _experts(self, parts: Parts, mid: Tensor) -> Tensor:
        """Mixtral: all experts and the router share the scale of the norm; each expert is searched on its own tokens."""
        from quant.experts import quantize_experts

        return quantize_experts(self, parts, mid)

    # -- on statistics of the float stream

    def from_statistics(self, saved: GramStatistics) -> BlockResult:
        def stats(name: str) -> InputStats:
            return from_sums(
                saved.grams[name].to(self.device), saved.mean_abs[name].to(self.device), saved.tokens[name]
            )

        for roles, name, norm_role in (
            (("q", "k", "v"), "attn_in", "attn_norm"),
            (("gate", "up"), "mlp_in", "mlp_norm"),
        ):
            if roles[0] not in self.source.linears or not _is_quantized(self.source, roles[0], self.quant):
                continue
            norm = self.source.norms[norm_role]
            solution = self.search(roles, stats(name), norm_fold(norm))
            self.put_norm(norm_role, fold_norm(norm, solution.channel_scale))
        lasts: list[tuple[str, str, str, Fold]] = [("o", "v", "o_in", kv_fold(self.weight("v"), self.config))]
        if "down" in self.source.linears:
            lasts.append(("down", "up", "down_in", row_fold(self.weight("up"))))
        for role, before, name, fold in lasts:
            if _is_quantized(self.source, role, self.quant):
                solution = self.search((role,), stats(name), fold)
                self.fold_back(before, solution)
        if self.config.num_experts:
            from quant.experts import experts_from_statistics

            experts_from_statistics(self, stats)
        return BlockResult(to_float16(self.weights), tuple(self.reports), None)


def _move(part: LinearWeights, device: torch.device) -> LinearWeights:
    weight = part.weight.to(device)
    return LinearWeights(weight, None if part.bias is None else part.bias.to(device))
