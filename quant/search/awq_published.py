"""AWQ: channel scales judged by the output of the block part that reads them, then clipping. Lin et al., AWQ, 2023.

N out features, K in features, S samples, L tokens a sample. Two things are ours: a block is judged on the quantized stream, which
is what it will read, and what makes a part's output worse than plain rounding is not taken.
"""

from dataclasses import replace

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import ModelConfig
from convert.families.table import scale_groups
from kernels.int4 import Quantized, quantize, quantize_codes
from quant.block_states import FloatBlock, FloatLinear, QuantizedBlock
from quant.block_task import BlockResult, BlockTask, LinearReport, Streams
from quant.config import QuantConfig
from quant.search.block_search import BlockSearch
from quant.search.scales.awq import candidates, exponents
from quant.search.scales.clip import search_published_clip
from quant.search.scales.folding import Fold, fold_norm, fold_rows, kv_fold, norm_fold, row_fold
from quant.selection import is_quantized
from quant.statistics.chunked_block import ChunkedBlock, linear
from quant.statistics.gram import InputStatistics, fast_products, observe

GRID = 20
NOT_CLIPPED = ("q", "k")  # as published: their product is attended to, not added


def quantize_published(task: BlockTask) -> BlockResult:
    """One block on its two streams."""
    inputs, tap = task.inputs, task.tap
    assert isinstance(inputs, Streams)  # the recipe reads the text itself: `quantize_block` has checked it
    weights = BlockSearch(task).source  # float32 norms, all on the device
    search = _Search(weights, task.config, task.quant, inputs.quantized)
    for before, readers in scale_groups(search.config):
        search.scale(before, readers)
    done, reports = search.finish()
    chunked = search.chunked
    dense, source = chunked.dense(done), chunked.dense(weights)
    quantized = chunked.map(lambda h: chunked.block(h, dense, tap), inputs.quantized)
    return BlockResult(
        done, tuple(reports), Streams(chunked.map(lambda h: chunked.block(h, source), inputs.fp), quantized)
    )


class _Search:
    """The block with the scales folded so far, and what each of its linears reads: x (S, L, H) through the block before its search."""

    def __init__(self, weights: FloatBlock, config: ModelConfig, quant: QuantConfig, x: Tensor) -> None:
        self.source: FloatBlock = weights
        self.weights = weights
        self.model, self.config, self.quant = config, config.of_layer(weights.index), quant
        self.chunked = ChunkedBlock(self.config, x)
        self.device = x.device
        dense = self.chunked.dense(weights)
        attn_in = self.chunked.map(lambda h: self.chunked.read(h, weights, "attn_norm"), x)
        self.inputs = {"q": attn_in, "o": self.chunked.map(lambda h: self.chunked.mixed(h, dense), attn_in)}
        mid = x + self.chunked.map(
            lambda h: self.chunked.added(
                linear(h, weights.linears["o"], self.weight("o")), weights, "attn_out_norm"
            ),
            self.inputs["o"],
        )
        mlp_in = self.chunked.map(lambda h: self.chunked.read(h, weights, "mlp_norm"), mid)
        self.inputs["gate"] = mlp_in
        if not config.num_experts:
            self.inputs["down"] = self.chunked.map(lambda h: self.chunked.gated(h, dense), mlp_in)
        self.values: dict[str, dict[str, float]] = {}
        self.stats: dict[str, InputStatistics] = {}
        self.scales: dict[str, Tensor] = {}  # by role: what multiplies the columns

    def weight(self, role: str) -> Tensor:
        return self.source.linears[role].weight.to(self.device).float()

    def key(self, role: str) -> str:
        """Whose input this linear reads; experts are judged together, on what the norm gives them."""
        part = role.rsplit(".", 1)[-1]
        return {"k": "q", "v": "q", "up": "gate", "router": "gate"}.get(part, part)

    def observed(self, role: str) -> InputStatistics:
        key = self.key(role)
        if key not in self.stats:
            chunks = (self.inputs[key][part] for part in self.chunked.slices())
            self.stats[key] = observe(chunks, f"Block {self.weights.index}, {role}")
        return self.stats[key]

    def fold(self, before: str) -> Fold:
        if before in self.source.norms:
            return norm_fold(self.source.norms[before], self.config.norm_offset)
        return kv_fold(self.weight(before), self.config) if before == "v" else row_fold(self.weight(before))

    def scale(self, before: str, readers: tuple[str, ...]) -> None:
        """Choose the scale of one group and fold it in; experts' own pairs (up, down) keep scale 1."""
        roles = tuple(role for role in readers if self._fits(role))
        if (
            not roles
            or self.key(roles[0]) not in self.inputs
            or (before not in self.source.norms and not self._fits(before))
        ):
            return
        fold, stats = self.fold(before), self.observed(roles[0])
        stacked = torch.cat([self.weight(role) for role in roles])
        grid = exponents(GRID)
        scales = candidates(stacked, stats.mean_abs, self.quant.group_size, fold, grid)
        losses = self._losses(roles, fold.spread(scales))
        losses = losses.nan_to_num(nan=torch.inf)
        chosen = int(losses.argmin())
        scale = scales[chosen]
        values = {"part_rtn": float(losses[0]), "part_scaled": float(losses[chosen])}
        if chosen:
            values |= {"alpha": grid[chosen - 1][0], "weight_term": float(grid[chosen - 1][1])}
        linears = dict(self.weights.linears)
        for role in readers:
            part = linears[role]
            weight = part.weight.to(self.device).float() * fold.spread(scale)
            linears[role] = replace(part, weight=weight)
            self.scales[role] = fold.spread(scale)
            self.values[role] = values
        norms = dict(self.weights.norms)
        if before in norms:
            norms[before] = fold_norm(norms[before], scale, self.config.norm_offset)
        else:
            linears[before] = fold_rows(linears[before], scale)
        self.weights = replace(self.weights, linears=linears, norms=norms)

    def _fits(self, role: str) -> bool:
        return is_quantized(self.model, self.quant, self.source.index, role)

    def _losses(self, roles: tuple[str, ...], column_scales: Tensor) -> Tensor:
        """Mean squared error of the part's output for every candidate (C, K): (C,)."""
        key = self.key(roles[0])
        losses = []
        with fast_products():
            if key in ("o", "down"):  # the part is the linear itself: the Gram form is its output error
                weight, gram = self.weight(roles[0]), self.stats[key].gram
                for scale in column_scales:
                    delta = self._rounded(weight * scale).div_(scale).sub_(weight)
                    losses.append((torch.matmul(delta, gram) * delta).sum())
                return torch.stack(losses)
            dense = self.chunked.dense(self.source)
            run = self.chunked.attention if key == "q" else self.chunked.mlp
            wanted = [run(self.inputs[key][part], dense) for part in self.chunked.slices()]
            for scale in column_scales:
                trial = dict(dense.linears)
                for role in roles:
                    rounded = self._rounded(self.weight(role) * scale).div_(scale)
                    trial[role] = FloatLinear(rounded.to(wanted[0].dtype), trial[role].bias)
                block = replace(dense, linears=trial)
                total = torch.zeros((), dtype=torch.float64, device=self.device)
                for part, good in zip(self.chunked.slices(), wanted, strict=True):
                    total += (
                        (run(self.inputs[key][part], block) - good).float().pow(2).sum(dtype=torch.float64)
                    )
                losses.append(total / self.inputs[key].numel())
        return torch.stack(losses).float()

    def _nearest(self, weight: Tensor) -> Quantized:
        return quantize(weight, self.quant.bits, self.quant.group_size, self.quant.symmetric)

    def _rounded(self, weight: Tensor) -> Tensor:
        return self._nearest(weight).dequantize()

    def finish(self) -> tuple[QuantizedBlock, list[LinearReport]]:
        """Clip and round what the scales have made of the linears; a part that clipping harms is left unclipped."""
        linears: dict[str, LinearWeights] = dict(self.weights.linears)
        rounded: dict[str, Quantized] = {}
        clipped: dict[str, Quantized] = {}
        taken: dict[str, Quantized] = {}
        for role, part in self.weights.linears.items():
            if not self._fits(role):
                continue
            scaled = part.weight.to(self.device).float()
            rounded[role] = self._nearest(scaled)
            clipped[role] = rounded[role] if role in NOT_CLIPPED else self._clip(role, scaled)
        for roles in self._parts_of(tuple(rounded)):
            better = self._better(roles, rounded, clipped)
            taken |= {role: better[role] for role in roles}
        for role, weight in taken.items():
            linears[role] = LinearWeights(weight, self.weights.linears[role].bias)
        reports = [
            self._report(role, taken[role], taken_clip=taken[role] is clipped[role]) for role in rounded
        ]
        block = self.weights
        done = BlockWeights(block.index, linears, block.norms, block.vectors, block.norm_offset)
        return QuantizedBlock.of(done), reports

    def _parts_of(self, roles: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Linears judged together: those that read the attention's norm, o, those that read the other norm, each down."""
        groups: dict[str, list[str]] = {}
        for role in roles:
            key = self.key(role)
            groups.setdefault(key if key in self.inputs else role, []).append(role)
        return [tuple(group) for group in groups.values()]

    def _better(
        self, roles: tuple[str, ...], rounded: dict[str, Quantized], clipped: dict[str, Quantized]
    ) -> dict[str, Quantized]:
        if self.key(roles[0]) not in self.inputs or all(clipped[role] is rounded[role] for role in roles):
            return rounded
        losses = [self._part_loss(roles, choice) for choice in (rounded, clipped)]
        self.values.setdefault(roles[0], {})
        for role in roles:
            # without a norm before them to take a scale over, linears have no loss of plain rounding yet
            first = {"part_rtn": losses[0], "part_scaled": losses[0]}
            self.values[role] = {**first, **self.values.get(role, {}), "part_after": min(losses)}
        return clipped if losses[1] < losses[0] else rounded

    def _part_loss(self, roles: tuple[str, ...], choice: dict[str, Quantized]) -> float:
        """Error of the part's output with these linears, mean over tokens (o, down: summed over outputs)."""
        key = self.key(roles[0])
        back = {role: self._unfolded(role, choice[role]) for role in roles}
        with fast_products():
            if key in ("o", "down"):
                delta = back[roles[0]] - self.weight(roles[0])
                return float((torch.matmul(delta, self.stats[key].gram) * delta).sum())
            dense = self.chunked.dense(self.source)
            run = self.chunked.attention if key == "q" else self.chunked.mlp
            like = self.inputs[key]
            trial = {
                **dense.linears,
                **{r: FloatLinear(w.to(like.dtype), dense.linears[r].bias) for r, w in back.items()},
            }
            block, total = replace(dense, linears=trial), 0.0
            for part in self.chunked.slices():
                delta = run(like[part], block) - run(like[part], dense)
                total += float(delta.float().pow(2).sum(dtype=torch.float64))
        return total / like.numel()

    def _unfolded(self, role: str, quantized: Quantized) -> Tensor:
        """What a quantized linear is worth in the space of the source: without the scales of its columns and rows."""
        weight = quantized.dequantize()
        if role in self.scales:
            weight = weight / self.scales[role]
        for before, readers in scale_groups(self.config):
            if before == role and readers[0] in self.scales:
                weight = weight * self.fold(before).shrink(self.scales[readers[0]])[:, None]
        return weight

    def _clip(self, role: str, weight: Tensor) -> Quantized:
        size, bits = self.quant.group_size, self.quant.bits
        key = self.key(role)
        if key not in self.inputs:
            return self._nearest(weight)
        gram = self.observed(role).gram
        column_scale = self.scales.get(role)
        if column_scale is not None:
            gram = gram / column_scale[:, None] / column_scale
        scale, zero = search_published_clip(weight, gram, size, bits, self.quant.symmetric)
        codes = quantize_codes(weight, scale, zero, size, bits)
        return Quantized(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), size, bits)

    def _report(self, role: str, quantized: Quantized, *, taken_clip: bool) -> LinearReport:
        values = self.values.get(role, {})
        steps = (("scale",) if "alpha" in values else ()) + (
            ("clip",) if taken_clip and role not in NOT_CLIPPED else ()
        )
        before = values.get("part_rtn", 0.0)
        after = values.get("part_after", values.get("part_scaled", before))
        return LinearReport(
            role, quantized.shape, before, values.get("part_scaled", before), after, steps, values=values
        )
