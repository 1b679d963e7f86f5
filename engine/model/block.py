"""One decoder block: the forward pass that calibration taps, learned rounding differentiates and serving batches.

T tokens, H hidden size, I intermediate size, D head size, Hq query and Hkv key heads. Tokens lie flat; which of them
form a sequence only `attend` knows. The mathematics stands once, in `_attention` and `_mlp`; `block_forward` and its
parts run it on tensors that are handed in, `Block` on layers made for inference.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.checkpoint import BlockWeights
from convert.config import ModelConfig
from engine.model.attention import Attend, HeadNorms
from engine.model.layers import (
    DenseLinear,
    Layer,
    Linear,
    functional_linear,
    fuse_linears,
    make_gated,
    make_linear,
)
from engine.model.ops import TORCH_OPS, Ops
from engine.model.rope import Rotary, apply_rope, rotary

# "attn_in" (T, H), "o_in" (T, Hq * D), "mlp_in" (T, H), "down_in" (T, I); "k", "v" (T, Hkv, D) as they are cached;
# with experts "experts.{e}.in" and "experts.{e}.down_in" of the tokens that reach expert e
Tap = Callable[[str, Tensor], None]
Reduce = Callable[[Tensor], Tensor]  # sum of the partial results of all ranks


@dataclass(frozen=True)
class _Parts:
    """What a block computes with: products and norm weights by role, and who implements the rest."""

    config: ModelConfig
    index: int
    linears: Mapping[
        str, Linear
    ]  # "qkv" may stand for q, k, v; "gate_up", which is silu(gate) * up, for gate and up
    norms: Mapping[str, Tensor]
    ops: Ops
    reduce: Reduce | None


def _attention(parts: _Parts, h: Tensor, angles: Rotary, attend: Attend, tap: Tap | None) -> Tensor:
    """Attention of normed hidden states h (T, H), output product included: (T, H)."""
    config, linears, ops = parts.config, parts.linears, parts.ops
    if tap is not None:
        tap("attn_in", h)
    fused = getattr(attend, "attend_qkv", None) if tap is None else None
    if fused is not None and "qkv" in linears:
        norms = None
        if config.qk_norm:
            norms = HeadNorms(parts.norms["q_norm"], parts.norms["k_norm"], config.norm_eps)
        out = fused(parts.index, linears["qkv"](h), angles, norms)
    else:
        q, k, v = _qkv(parts, h)
        if config.qk_norm:
            q = ops.rms_norm(q, parts.norms["q_norm"], config.norm_eps)
            k = ops.rms_norm(k, parts.norms["k_norm"], config.norm_eps)
        q, k = apply_rope(q, angles), apply_rope(k, angles)
        if angles.q_scale is not None:
            q = q * angles.q_scale.to(q.dtype)[:, None, None]
        if tap is not None:
            tap("k", k)
            tap("v", v)
        out = attend(parts.index, q, k, v)
    if tap is not None:
        tap("o_in", out)
    out = linears["o"](out)
    return out if parts.reduce is None else parts.reduce(out)


def _qkv(parts: _Parts, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (T, Hq, D), k and v (T, Hkv, D) before norms and RoPE."""
    config, linears = parts.config, parts.linears
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if "qkv" in linears:
        q, k, v = linears["qkv"](h).split((queries, keys, keys), dim=-1)
    else:
        q, k, v = (linears[role](h) for role in ("q", "k", "v"))
    q, k, v = (t.unflatten(-1, (-1, config.head_dim)) for t in (q, k, v))
    return q, k, v


def _mlp(parts: _Parts, h: Tensor, tap: Tap | None) -> Tensor:
    """The MLP or the experts on normed hidden states h (T, H): (T, H)."""
    if tap is not None:
        tap("mlp_in", h)
    if parts.config.num_experts:
        out = _experts(parts, h, tap)
    else:
        out = _gated(parts, h, "", tap)
    return out if parts.reduce is None else parts.reduce(out)


def _gated(parts: _Parts, h: Tensor, prefix: str, tap: Tap | None) -> Tensor:
    """down(silu(gate(h)) * up(h)) of the MLP or of the expert with this prefix."""
    linears = parts.linears
    if prefix + "gate_up" in linears:
        inner = linears[prefix + "gate_up"](h)
    else:
        inner = F.silu(linears[prefix + "gate"](h)) * linears[prefix + "up"](h)
    if tap is not None:
        tap(prefix + "down_in", inner)
    return linears[prefix + "down"](inner)


def _experts(parts: _Parts, h: Tensor, tap: Tap | None) -> Tensor:
    """Each token goes through its likeliest experts, weighted by their renormalised softmax in float32 (Mixtral)."""
    scores = torch.softmax(parts.linears["router"](h).float(), dim=-1)  # (T, E)
    top, chosen = torch.topk(scores, parts.config.experts_per_token, dim=-1)
    top = top / top.sum(dim=-1, keepdim=True)
    out = torch.zeros_like(h)
    for expert in range(parts.config.num_experts):
        tokens, place = torch.where(chosen == expert)
        if not len(tokens):
            continue
        inputs = h[tokens]
        if tap is not None:
            tap(f"experts.{expert}.in", inputs)
        result = _gated(parts, inputs, f"experts.{expert}.", tap)
        out = out.index_add(0, tokens, (result * top[tokens, place, None]).to(out.dtype))
    return out


def _advance(
    parts: _Parts, x: Tensor, delta: Tensor | None, angles: Rotary, attend: Attend, tap: Tap | None
) -> tuple[Tensor, Tensor]:
    """The block on the residual stream x + delta; returns the same pair, so that a sum and the next norm are one kernel."""
    ops, eps = parts.ops, parts.config.norm_eps
    if delta is None:
        h = ops.rms_norm(x, parts.norms["attn_norm"], eps)
    else:
        x, h = ops.add_rms_norm(x, delta, parts.norms["attn_norm"], eps)
    x, h = ops.add_rms_norm(x, _attention(parts, h, angles, attend, tap), parts.norms["mlp_norm"], eps)
    return x, _mlp(parts, h, tap)


def _functional(weights: BlockWeights, config: ModelConfig, like: Tensor) -> _Parts:
    linears = {
        role: functional_linear(part, like.dtype, like.device) for role, part in weights.linears.items()
    }
    norms = {role: norm.to(device=like.device, dtype=like.dtype) for role, norm in weights.norms.items()}
    return _Parts(config, weights.index, linears, norms, TORCH_OPS, None)


def block_forward(
    x: Tensor,
    positions: Tensor,
    weights: BlockWeights,
    config: ModelConfig,
    attend: Attend,
    tap: Tap | None = None,
    *,
    angles: Rotary | None = None,
) -> Tensor:
    """The block with these weights on hidden states x (T, H): (T, H), in the dtype and on the device of x.

    Differentiable in x and in every weight that is a tensor; Quantized ones are dequantized. positions (T,) int64;
    `angles` spares computing them again for every block.
    """
    angles = rotary(config, positions) if angles is None else angles
    x, delta = _advance(_functional(weights, config, x), x, None, angles, attend, tap)
    return x + delta


def attention_forward(
    h: Tensor,
    positions: Tensor,
    weights: BlockWeights,
    config: ModelConfig,
    attend: Attend,
    tap: Tap | None = None,
    *,
    angles: Rotary | None = None,
) -> Tensor:
    """The attention part alone: h (T, H) is already normed; no residual is added. Reads the linears q, k, v, o only."""
    angles = rotary(config, positions) if angles is None else angles
    return _attention(_functional(weights, config, h), h, angles, attend, tap)


def mlp_forward(h: Tensor, weights: BlockWeights, config: ModelConfig, tap: Tap | None = None) -> Tensor:
    """The MLP part alone: h (T, H) is already normed; no residual is added. Reads gate, up, down (or the experts) only."""
    return _mlp(_functional(weights, config, h), h, tap)


def _inference_layers(
    weights: BlockWeights, dtype: torch.dtype, device: torch.device | str, ops: Ops
) -> dict[str, Layer]:
    """q/k/v joined to one layer, each gate/up pair to another, where their formats allow it."""
    left = dict(weights.linears)
    layers: dict[str, Layer] = {}
    qkv = fuse_linears([left[role] for role in ("q", "k", "v")])
    if qkv is not None:
        left = {role: part for role, part in left.items() if role not in ("q", "k", "v")} | {"qkv": qkv}
    for gate in [role for role in left if role.endswith("gate")]:
        prefix = gate.removesuffix("gate")
        gated = make_gated(left[gate], left[prefix + "up"], dtype, device, ops.silu_mul)
        if gated is not None:
            layers[prefix + "gate_up"] = gated
            del left[gate], left[prefix + "up"]
    return layers | {role: make_linear(part, dtype, device) for role, part in left.items()}


class Block:
    """A decoder block for inference: weights converted and joined once, q/k/v as one product, gate/up as another."""

    def __init__(
        self,
        config: ModelConfig,
        weights: BlockWeights,
        dtype: torch.dtype,
        device: torch.device | str,
        ops: Ops = TORCH_OPS,
        reduce: Reduce | None = None,
    ) -> None:
        self.linears = _inference_layers(weights, dtype, device, ops)
        self.norms = {role: norm.to(device=device, dtype=dtype) for role, norm in weights.norms.items()}
        self._parts = _Parts(config, weights.index, self.linears, self.norms, ops, reduce)
        self.config, self.index = config, weights.index

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        attend: Attend,
        tap: Tap | None = None,
        *,
        angles: Rotary | None = None,
    ) -> Tensor:
        """x (T, H) -> (T, H)."""
        x, delta = self.advance(
            x, None, rotary(self.config, positions) if angles is None else angles, attend, tap
        )
        return x + delta

    __call__ = forward

    def advance(
        self, x: Tensor, delta: Tensor | None, angles: Rotary, attend: Attend, tap: Tap | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, on a residual stream held as the pair (x, delta), whose sum the next norm takes."""
        return _advance(self._parts, x, delta, angles, attend, tap)

    def attention(self, h: Tensor, angles: Rotary, attend: Attend, tap: Tap | None = None) -> Tensor:
        """The attention part on normed h (T, H), without the residual."""
        return _attention(self._parts, h, angles, attend, tap)

    def mlp(self, h: Tensor, tap: Tap | None = None) -> Tensor:
        """The MLP part on normed h (T, H), without the residual."""
        return _mlp(self._parts, h, tap)

    def pack(self) -> None:
        """Lay the float weights out for decoding on the CPU; see `DenseLinear.pack`."""
        for layer in self.linears.values():
            if isinstance(layer, DenseLinear):
                layer.pack()

    @property
    def size_bytes(self) -> int:
        return sum(layer.size_bytes for layer in self.linears.values()) + sum(
            n.nbytes for n in self.norms.values()
        )
