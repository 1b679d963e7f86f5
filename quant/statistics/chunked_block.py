"""A block taken apart at its linears: what each of them reads, for whole streams, in chunks that fit in memory.

S samples, L tokens a sample, H hidden size, T = S * L tokens, K in features of a linear. The mathematics is the engine's.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import ModelConfig
from engine.model.attention import Attend, causal_attend
from engine.model.block import Tap, attention_forward, block_forward, half_output, mlp_forward
from engine.model.layers import dense_weight
from engine.model.ops import rms_norm
from engine.model.rope import Rotary, rotary
from kernels.block import fused
from kernels.products import linear as product
from quant.block_states import FloatBlock, FloatLinear
from quant.statistics.chunks import chunks


class ChunkedBlock:
    """Runs parts of one block over streams (S, L, H) in the compute dtype."""

    def __init__(self, config: ModelConfig, stream: Tensor) -> None:
        self.config = config
        self.samples, self.length, _ = stream.shape
        self._angles: dict[int, tuple[Tensor, Rotary]] = {}
        self._device, self._dtype = stream.device, stream.dtype

    def slices(self) -> Iterator[slice]:
        """Samples of one chunk after the other."""
        return chunks(self.samples, self.length, self._device)

    def map(self, function: Callable[..., Tensor], *streams: Tensor) -> Tensor:
        """function over chunks of streams (S, L, ...), joined again."""
        return torch.cat([function(*(stream[part] for stream in streams)) for part in self.slices()])

    def dense(self, weights: BlockWeights, roles: tuple[str, ...] | None = None) -> FloatBlock:
        """The same block with weights as floats of the stream's dtype, so that no chunk has to convert them.

        roles: the only linears that are wanted.
        """
        linears = {
            role: FloatLinear(
                dense_weight(part.weight, self._dtype, self._device),
                None if part.bias is None else part.bias.to(device=self._device, dtype=self._dtype),
            )
            for role, part in weights.linears.items()
            if roles is None or role in roles
        }
        return FloatBlock(weights.index, linears, weights.norms, weights.vectors, weights.norm_offset)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of a chunk (s, L, H)."""
        dtype = torch.float32 if self.config.norm_offset else x.dtype
        weight = weight.to(device=x.device, dtype=dtype)
        trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        one_kernel = x.is_cuda and x.dtype == dtype != torch.float32 and not trains
        return (fused.rms_norm if one_kernel else rms_norm)(x, weight, self.config.norm_eps)

    def read(self, x: Tensor, weights: BlockWeights, role: str) -> Tensor:
        """What a half of the block reads of a chunk of the residual stream: through the norm `role`, where there is one."""
        return self.norm(x, weights.norms[role]) if role in weights.norms else x

    def added(self, out: Tensor, weights: BlockWeights, role: str) -> Tensor:
        """What a half adds to the residual stream, for its last product `out` (s, L, H) and the norm `role` of what it gives."""
        norm = weights.norms.get(role)
        return half_output(out, norm, self.config, lambda x, weight, _: self.norm(x, weight))

    def mixed(self, h: Tensor, weights: BlockWeights, tap: Tap | None = None) -> Tensor:
        """What o reads, for normed inputs h of a chunk: (s, L, H) -> (s, L, Hq * D)."""
        return self._tapped(
            "o_in", lambda grab: self._attention(h, _without(weights, "o", h), _both(grab, tap)), h
        )

    def rotated_keys(self, h: Tensor, weights: BlockWeights, tap: Tap) -> None:
        """Shows `tap` K and V of normed inputs h (s, L, H) of a chunk, as they are cached; no attention, no product of o."""
        positions, angles = self._positions(len(h))
        attention_forward(
            h.flatten(0, 1),
            positions,
            _without(weights, "o", h),
            self.config,
            lambda layer, q, k, v: q.flatten(1),
            tap,
            angles=angles,
        )

    def attention(self, h: Tensor, weights: BlockWeights, tap: Tap | None = None) -> Tensor:
        """The attention part, o included: (s, L, H) -> (s, L, H)."""
        return self._attention(h, weights, tap).view(h.shape)

    def gated(self, h: Tensor, weights: BlockWeights) -> Tensor:
        """What down reads: (s, L, H) -> (s, L, I)."""
        flat = h.flatten(0, 1)
        return self._tapped(
            "down_in", lambda grab: mlp_forward(flat, _without(weights, "down", h), self.config, grab), h
        )

    def mlp(self, h: Tensor, weights: BlockWeights, tap: Tap | None = None) -> Tensor:
        """The MLP part or the experts: (s, L, H) -> (s, L, H)."""
        return mlp_forward(h.flatten(0, 1), weights, self.config, tap).view(h.shape)

    def block(
        self, x: Tensor, weights: BlockWeights, tap: Tap | None = None, *, attend: Attend | None = None
    ) -> Tensor:
        """The whole block: (s, L, H) -> (s, L, H). Differentiable in the weights; `attend` in place of the usual one."""
        positions, angles = self._positions(len(x))
        attend = attend or causal_attend(len(x), self.length, self.config)
        out = block_forward(x.flatten(0, 1), positions, weights, self.config, attend, tap, angles=angles)
        return out.view(x.shape)

    def _attention(self, h: Tensor, weights: BlockWeights, tap: Tap | None) -> Tensor:
        positions, angles = self._positions(len(h))
        attend = causal_attend(len(h), self.length, self.config)
        return attention_forward(h.flatten(0, 1), positions, weights, self.config, attend, tap, angles=angles)

    def _positions(self, samples: int) -> tuple[Tensor, Rotary]:
        if samples not in self._angles:
            positions = torch.arange(self.length, device=self._device).repeat(samples)
            self._angles[samples] = positions, rotary(self.config, positions)
        return self._angles[samples]

    def _tapped(self, name: str, run: Callable[[Tap], object], like: Tensor) -> Tensor:
        found: list[Tensor] = []
        run(lambda tapped, value: found.append(value) if tapped == name else None)
        return found[0].view(*like.shape[:2], -1)


def linear(x: Tensor, weights: LinearWeights, weight: Tensor) -> Tensor:
    """x W^T + b with this dense weight in place of that of `weights`, in the dtype of x."""
    bias = None if weights.bias is None else weights.bias.to(device=x.device, dtype=x.dtype)
    return product(x, weight.to(x.dtype), bias)


def _both(first: Tap, second: Tap | None) -> Tap:
    if second is None:
        return first

    def tap(name: str, value: Tensor) -> None:
        first(name, value)
        second(name, value)

    return tap


def _without(weights: BlockWeights, role: str, like: Tensor) -> BlockWeights:
    """The same block with an empty product in this role: its input is tapped, nothing is multiplied."""
    cols = weights.linears[role].weight.shape[1]
    empty = LinearWeights(torch.empty(0, cols, dtype=like.dtype, device=like.device))
    return replace(weights, linears={**weights.linears, role: empty})
