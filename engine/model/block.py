"""One decoder block: the forward pass that calibration taps, learned rounding differentiates and serving batches.

T tokens, H hidden size, I intermediate size, D head size, Hq query and Hkv key heads. Tokens lie flat; which of them
form a sequence only `attend` knows. The mathematics stands once, in `_attention` and `_mlp`; `block_forward` and its
parts run it on tensors that are handed in, `Block` on layers made for inference.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights
from convert.config import ModelConfig
from engine.model.attention import Attend, HeadNorms, window_of
from engine.model.expert_layers import ExpertLayers, make_experts
from engine.model.experts import route, weighted_sum
from engine.model.layers import (
    DenseLinear,
    Layer,
    Linear,
    functional_linear,
    fuse_linears,
    make_gated,
    make_linear,
)
from engine.model.ops import TORCH_OPS, Ops, activate
from engine.model.rope import Rotary, apply_rope, rotary

# "attn_in" (T, H), "o_in" (T, Hq * D), "mlp_in" (T, H), "down_in" (T, I); "k", "v" (T, Hkv, D) as they are cached;
# with experts "experts.{e}.in" and "experts.{e}.down_in" of the tokens that reach expert e, and "shared.down_in"
Tap = Callable[[str, Tensor], None]
Reduce = Callable[[Tensor], Tensor]  # sum of the partial results of all ranks


@dataclass(frozen=True)
class _Parts:
    """What a block computes with: products and norm weights by role, and who implements the rest."""

    config: ModelConfig
    index: int
    # "qkv" may stand for q, k, v; "gate_up", which is act(gate) * up, for gate and up
    linears: Mapping[str, Linear]
    norms: Mapping[str, Tensor]
    vectors: Mapping[str, Tensor]
    ops: Ops
    reduce: Reduce | None
    experts: ExpertLayers | None = None  # in place of the linears "experts.{e}.*"


def _attention(parts: _Parts, h: Tensor, angles: Rotary, attend: Attend, tap: Tap | None) -> Tensor:
    """Attention of normed hidden states h (T, H), output product included: (T, H)."""
    config, linears = parts.config, parts.linears
    angles = angles.of_layer(window_of(config, parts.index) is not None)
    if tap is not None:
        tap("attn_in", h)
    fused = getattr(attend, "attend_qkv", None) if tap is None else None
    if config.qk_norm and config.qk_norm_width == "all":
        fused = None  # the kernel norms head by head
    if fused is not None and "qkv" in linears:
        norms = None
        if config.qk_norm:
            norms = HeadNorms(parts.norms["q_norm"], parts.norms["k_norm"], config.norm_eps)
        out = fused(parts.index, linears["qkv"](h), angles, norms)
    else:
        q, k, v = _qkv(parts, h)
        if config.qk_norm:
            q, k = _qk_norm(parts, q, "q_norm"), _qk_norm(parts, k, "k_norm")
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


def _qk_norm(parts: _Parts, x: Tensor, role: str) -> Tensor:
    """q or k (T, heads, D) normed head by head, or over all heads together."""
    norm, eps = parts.norms[role], parts.config.norm_eps
    if parts.config.qk_norm_width == "head":
        return parts.ops.rms_norm(x, norm, eps)
    return parts.ops.rms_norm(x.flatten(1), norm, eps).view(x.shape)


def _mlp(parts: _Parts, h: Tensor, tap: Tap | None) -> Tensor:
    """The MLP or the experts on hidden states h (T, H), normed where the family norms them first: (T, H)."""
    if tap is not None:
        tap("mlp_in", h)
    if parts.config.num_experts:
        out = _experts(parts, h, tap)
    else:
        out = _gated(parts, h, "", tap)
    return out if parts.reduce is None else parts.reduce(out)


def _gated(parts: _Parts, h: Tensor, prefix: str, tap: Tap | None) -> Tensor:
    """down(act(gate(h)) * up(h)) of the MLP or of the expert with this prefix."""
    linears = parts.linears
    if prefix + "gate_up" in linears:
        inner = linears[prefix + "gate_up"](h)
    else:
        inner = activate(parts.config.activation, linears[prefix + "gate"](h)) * linears[prefix + "up"](h)
    if tap is not None:
        tap(prefix + "down_in", inner)
    return linears[prefix + "down"](inner)


def _experts(parts: _Parts, h: Tensor, tap: Tap | None) -> Tensor:
    """The experts that the router chooses for each token, and the one that every token goes through."""
    config = parts.config
    weights, chosen = route(_router_logits(parts, h), config, parts.vectors.get("router_bias"))

    def run(expert: int, inputs: Tensor) -> Tensor:
        if tap is not None:
            tap(f"experts.{expert}.in", inputs)
        return _gated(_of_expert(parts, expert), inputs, f"experts.{expert}.", tap)

    if parts.experts is not None and tap is None:
        out = parts.experts(h, chosen, weights)
    else:
        out = weighted_sum(h, weights, chosen, config.num_experts, run)
    if not config.shared_intermediate_size:
        return out
    shared = _gated(parts, h, "shared.", tap)
    if config.shared_gated:
        shared = shared * torch.sigmoid(parts.linears["shared.router"](h))
    return out + shared


def _of_expert(parts: _Parts, expert: int) -> _Parts:
    """The parts with one expert's linears, taken out of the layer of all experts where there is one."""
    if parts.experts is None:
        return parts
    gate_up, down = parts.experts.of_expert(expert)
    names = {f"experts.{expert}.gate_up": gate_up, f"experts.{expert}.down": down}
    return replace(parts, linears=names)


def _router_logits(parts: _Parts, h: Tensor) -> Tensor:
    return parts.linears["router"](h.to(_dtype_of("router", parts.config, h.dtype)))  # (T, E)


def _dtype_of(role: str, config: ModelConfig, dtype: torch.dtype) -> torch.dtype:
    """In which dtype a linear computes. Sigmoid scores lie close together, so their router computes in float32 (GLM-4)."""
    return torch.float32 if role == "router" and config.router.scores == "sigmoid" else dtype


def _normed(parts: _Parts, x: Tensor, delta: Tensor | None, role: str) -> tuple[Tensor, Tensor]:
    """The residual stream x + delta, and what a half of the block reads of it: normed where the family has this norm."""
    norm, eps = parts.norms.get(role), parts.config.norm_eps
    if norm is None:
        x = x if delta is None else x + delta
        return x, x
    if delta is None:
        return x, parts.ops.rms_norm(x, norm, eps)
    return parts.ops.add_rms_norm(x, delta, norm, eps)


def half_output(
    out: Tensor, norm: Tensor | None, config: ModelConfig, rms_norm: Callable[[Tensor, Tensor, float], Tensor]
) -> Tensor:
    """What a half of the block adds to the residual stream: its last product `out`, normed and scaled where the family does so."""
    if norm is not None:
        out = rms_norm(out, norm, config.norm_eps)
    return out if config.residual_scale == 1.0 else out * config.residual_scale


def _advance(
    parts: _Parts, x: Tensor, delta: Tensor | None, angles: Rotary, attend: Attend, tap: Tap | None
) -> tuple[Tensor, Tensor]:
    """The block on the residual stream x + delta; returns the same pair, so that a sum and the next norm are one kernel."""
    config, norms, rms_norm = parts.config, parts.norms, parts.ops.rms_norm
    x, h = _normed(parts, x, delta, "attn_norm")
    out = _attention(parts, h, angles, attend, tap)
    x, h = _normed(parts, x, half_output(out, norms.get("attn_out_norm"), config, rms_norm), "mlp_norm")
    return x, half_output(_mlp(parts, h, tap), norms.get("mlp_out_norm"), config, rms_norm)


def _norm_weights(
    weights: BlockWeights, config: ModelConfig, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Norms in the compute dtype; in float32 where files hold them minus an offset, as those families compute."""
    wide = torch.float32 if config.norm_offset else dtype
    return {role: norm.to(device=device, dtype=wide) for role, norm in weights.norms.items()}


def _functional(weights: BlockWeights, config: ModelConfig, like: Tensor) -> _Parts:
    config = config.of_layer(weights.index)
    linears = {
        role: functional_linear(part, _dtype_of(role, config, like.dtype), like.device)
        for role, part in weights.linears.items()
    }
    norms = _norm_weights(weights, config, like.dtype, like.device)
    vectors = {role: vector.to(like.device) for role, vector in weights.vectors.items()}
    return _Parts(config, weights.index, linears, norms, vectors, TORCH_OPS, None)


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
    weights: BlockWeights, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, ops: Ops
) -> dict[str, Layer]:
    """q/k/v joined to one layer, each gate/up pair to another, where their formats allow it."""
    left = dict(weights.linears)
    layers: dict[str, Layer] = {}
    qkv = fuse_linears([left[role] for role in ("q", "k", "v")])
    if qkv is not None:
        left = {role: part for role, part in left.items() if role not in ("q", "k", "v")} | {"qkv": qkv}
    act = config.activation
    for gate in [role for role in left if role.rsplit(".", 1)[-1] == "gate"]:
        prefix = gate.removesuffix("gate")
        gated = make_gated(left[gate], left[prefix + "up"], dtype, device, ops.gated_mul(act), act)
        if gated is not None:
            layers[prefix + "gate_up"] = gated
            del left[gate], left[prefix + "up"]
    return layers | {
        role: make_linear(part, _dtype_of(role, config, dtype), device) for role, part in left.items()
    }


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
        config = config.of_layer(weights.index)
        self.experts = make_experts(weights.linears, config, dtype, device) if config.num_experts else None
        if self.experts is not None:
            rest = {role: part for role, part in weights.linears.items() if not role.startswith("experts.")}
            weights = replace(weights, linears=rest)
        self.linears = _inference_layers(weights, config, dtype, device, ops)
        self.norms = _norm_weights(weights, config, dtype, device)
        vectors = {role: vector.to(device) for role, vector in weights.vectors.items()}
        self._parts = _Parts(
            config, weights.index, self.linears, self.norms, vectors, ops, reduce, self.experts
        )
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
    def waits_for_host(self) -> bool:
        """True where the host chooses what runs: experts that are no single layer."""
        return bool(self.config.num_experts) and self.experts is None

    @property
    def size_bytes(self) -> int:
        experts = 0 if self.experts is None else self.experts.size_bytes
        linears = sum(layer.size_bytes for layer in self.linears.values())
        return experts + linears + sum(norm.nbytes for norm in self.norms.values())
