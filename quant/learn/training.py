"""What learned rounding and distillation share: the quantizer with its straight-through gradient, flat weights, Adam, batches.

N out features, K in features, g group size. All linears of a block lie in one flat tensor (rows of g), so that quantizing them
takes a handful of kernels. Knows no loss.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from convert.families.norms import storable_norm
from engine.model.attention import Attend
from kernels.int4 import Quantized, round_scale
from kernels.search.training import adam_step, round_to_grid, round_to_grid_backward
from quant.block_states import FloatBlock, FloatLinear, QuantizedBlock

REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # cuDNN's is not


class RoundToGrid(torch.autograd.Function):
    """w^ = clamp(round(v), -z, Q - z) * s for latent codes v (R, g), s and z (R, 1).

    Straight through: dv = dw * s where nothing was clamped, ds = sum over the group of dw * r.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
        ctx.save_for_backward(latent, scale, zero)
        ctx.max_code = max_code
        return round_to_grid(latent, scale, zero, max_code)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        latent, scale, zero = ctx.saved_tensors
        return *round_to_grid_backward(grads[0], latent, scale, zero, ctx.max_code), None, None


class ScaleCodes(torch.autograd.Function):
    """w^ = r * s for fixed codes r (R, g) int8 and s (R, 1): the gradient reaches s alone."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (codes,) = ctx.saved_tensors
        return None, (grads[0] * codes).sum(-1, keepdim=True)


@contextmanager
def repeatable() -> Iterator[None]:
    """Gradients that repeat bit for bit, but for attention, which `training_attend` sees to: what has no such form still runs."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else strict mode refuses products
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


class _Mode:
    """Whether the backward pass of one attention has changed the mode of `repeatable`, and must change it back."""

    is_changed = False


class _Switch(torch.autograd.Function):
    """The identity; going backward it turns strict mode on, or off again where it was turned on.

    Attention on a GPU takes its repeatable backward pass in strict mode alone: in one that warns it keeps its atomic sums.
    """

    @staticmethod
    def forward(ctx: Any, mode: _Mode, is_on: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.mode, ctx.is_on = mode, is_on
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        mode: _Mode = ctx.mode
        if ctx.is_on and torch.is_deterministic_algorithms_warn_only_enabled():
            mode.is_changed = torch.are_deterministic_algorithms_enabled()
        if mode.is_changed:
            torch.use_deterministic_algorithms(True, warn_only=not ctx.is_on)
            mode.is_changed = ctx.is_on
        return None, None, *grads


def repeatable_backward(attend: Attend) -> Attend:
    """The same attention; in `repeatable` its backward pass, and no more than that, must be one that repeats."""

    def held(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mode = _Mode()
        with sdpa_kernel(REPEATABLE):
            out = attend(layer, *_Switch.apply(mode, False, q, k, v))
        switched: tuple[Tensor] = _Switch.apply(mode, True, out)
        return switched[0]

    return held


def training_attend(attend: Attend, device: torch.device) -> Attend:
    """Attention for float32 training: on a GPU its operands are bfloat16, for which there is a fast and repeatable kernel."""
    if device.type != "cuda":
        return attend

    def narrow(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return repeatable_backward(attend)(layer, q.bfloat16(), k.bfloat16(), v.bfloat16()).to(q.dtype)

    return narrow


def straight_through(value: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """rounding(value) going forward, the identity going backward."""
    return value + (rounding(value) - value).detach()


def fp16_scale(scale: Tensor) -> Tensor:
    """Scales as they will be stored, differentiable."""
    return straight_through(scale, round_scale)


def stored_norm(norm: Tensor, offset: float) -> Tensor:
    """Norm weights as files will give them back, which hold them less `offset`, differentiable."""
    return straight_through(norm, lambda value: storable_norm(value, offset).to(value.dtype))


@dataclass(frozen=True)
class FlatLinears:
    """The quantized linears of some blocks as rows of groups: codes (R, g), scales and zeros (R, 1), float32 or int8.

    What else the blocks hold lies on the same device: a step that is captured as a graph may copy nothing from the host.
    """

    blocks: tuple[QuantizedBlock, ...]
    names: tuple[tuple[int, str], ...]  # (position in blocks, role)
    codes: Tensor  # centred, int8
    scales: Tensor
    zeros: Tensor
    group_size: int

    @staticmethod
    def of(blocks: Sequence[QuantizedBlock], device: torch.device | str) -> "FlatLinears":
        """Raises ValueError where no linear is quantized."""
        weights = {
            (position, role): weight
            for position, block in enumerate(blocks)
            for role, weight in block.quantized.items()
        }
        if not weights:
            raise ValueError("No linear of these blocks is quantized: there is nothing to train.")
        group_size = next(iter(weights.values())).group_size
        codes, scales, zeros = [], [], []
        for weight in weights.values():
            zero = weight.zeros.to(device).reshape(-1, 1)
            codes.append(weight.codes.to(device).view(-1, group_size).to(torch.int8) - zero.to(torch.int8))
            scales.append(weight.scales.to(device).reshape(-1, 1).float())
            zeros.append(zero.float())
        return FlatLinears(
            tuple(block.floats_on(device) for block in blocks),
            tuple(weights),
            torch.cat(codes),
            torch.cat(scales),
            torch.cat(zeros),
            group_size,
        )

    def _weight(self, name: tuple[int, str]) -> Quantized:
        return self.blocks[name[0]].quantized[name[1]]

    @property
    def _rows(self) -> list[int]:
        return [self._weight(name).scales.numel() for name in self.names]

    def dense(
        self, flat: Tensor, norms: Sequence[dict[str, Tensor]], device: torch.device | str
    ) -> list[FloatBlock]:
        """Blocks whose quantized linears are slices of `flat` (R, g)."""
        pieces = dict(zip(self.names, flat.split(self._rows), strict=True))
        out = []
        for position, block in enumerate(self.blocks):
            floats = block.floats
            linears: dict[str, FloatLinear] = {}
            for role, part in block.linears.items():
                weight = floats.get(role)
                if weight is None:
                    weight = pieces[position, role].view(part.weight.shape)
                bias = None if part.bias is None else part.bias.to(device).float()
                linears[role] = FloatLinear(weight.to(device), bias)
            moved = {**block.norms, **norms[position]}
            out.append(FloatBlock(block.index, linears, moved, block.vectors, block.norm_offset))
        return out

    def packed(
        self, codes: Tensor, scales: Tensor, norms: Sequence[dict[str, Tensor]]
    ) -> list[QuantizedBlock]:
        """Blocks with these centred codes (R, g), scales (R, 1) and norms, as packed types."""
        linears = [dict(block.linears) for block in self.blocks]
        rows = self._rows
        for name, r, s in zip(self.names, codes.split(rows), scales.split(rows), strict=True):
            old, (position, role) = self._weight(name), name
            zeros = old.zeros.to(r.device)
            full = r.view(*old.scales.shape, -1) + zeros[..., None]
            weight = replace(
                old,
                codes=full.view(old.shape).to(torch.uint8),
                scales=s.view(old.scales.shape).half(),
                zeros=zeros,
            )
            linears[position][role] = replace(linears[position][role], weight=weight)
        return [
            replace(block, linears=parts, norms={**block.norms, **_storable(moved, block.norm_offset)})
            for block, parts, moved in zip(self.blocks, linears, norms, strict=True)
        ]


def _storable(norms: dict[str, Tensor], offset: float) -> dict[str, Tensor]:
    return {role: storable_norm(norm.detach(), offset) for role, norm in norms.items()}


@dataclass
class Adam:
    """Adam (Kingma and Ba, 2014) on a few tensors, every quantity a tensor so that a step can be captured as a graph."""

    params: list[Tensor]
    rates: list[float]
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        self._first = [torch.zeros_like(p) for p in self.params]
        self._second = [torch.zeros_like(p) for p in self.params]
        self._bias = torch.ones(2, device=self.params[0].device)
        self._betas = torch.tensor(self.betas, device=self.params[0].device)

    def state(self) -> list[Tensor]:
        """The tensors that an update changes beside the parameters, to save and to put back in place."""
        return [*self._first, *self._second, self._bias]

    def step(
        self,
        grads: Sequence[Tensor],
        schedule: Tensor,
        means: Sequence[Tensor | None] | None = None,
        average: float = 0.0,
    ) -> None:
        """One update; schedule: a factor on all rates, a tensor of one element.

        means: running means of the parameters, in which the past weighs `average`; updated too.
        """
        self._bias.mul_(self._betas)
        bias = 1 - self._bias
        state = zip(self.params, grads, self._first, self._second, self.rates, strict=True)
        for (p, grad, m, v, rate), mean in zip(state, means or [None] * len(self.params), strict=True):
            adam_step(p, grad, m, v, bias, schedule, rate, self.betas, mean, average)


def batches(samples: int, size: int, steps: int, seed: int) -> Tensor:
    """Sample numbers of each step, (steps, size) int64: one random order after another, each sample once in each."""
    generator = torch.Generator().manual_seed(seed)
    orders, have = [], 0
    while have < steps * size:
        orders.append(torch.randperm(samples, generator=generator))
        have += samples
    return torch.cat(orders)[: steps * size].view(steps, size)


def rise(steps: int, warmup: float) -> Tensor:
    """Factors on the rates: a linear rise to 1 over the first `warmup` (a share) of the steps, (steps,)."""
    return ((torch.arange(steps) + 1) / max(1.0, warmup * steps)).clamp(max=1)
