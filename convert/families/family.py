"""`Family`: one row of the table of model families, which names the variant of each part of a block. Knows no files.

Roles of a decoder block's linears: q, k, v, o, gate, up, down; in a mixture router, experts.{e}.gate|up|down and, where every
token goes through one more expert, shared.gate|up|down and shared.router (its gate, one row).
Roles of its norms: attn_norm and mlp_norm (what a half of the block reads), attn_out_norm and mlp_out_norm (what it gives),
q_norm, k_norm. Other vectors: router_bias (added to the scores for the choice of experts).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from convert.config import Activation, NormPlacement

# How the rows of a fused tensor hold its linears. "stacked": all of the first, then all of the second, and so on.
# "grouped": for each KV head its q heads, its k, its v.
FusedLayout = Literal["stacked", "grouped"]


@dataclass(frozen=True)
class Fused:
    """A tensor whose rows hold several linears of one input."""

    module: str
    roles: tuple[str, ...]
    layout: FusedLayout = "stacked"


@dataclass(frozen=True)
class Mixture:
    """The keys of config.json that describe a mixture of experts, and what the architecture fixes. None: the part is absent."""

    experts: tuple[str, ...]  # the first key that is present counts
    size: str | None = None  # intermediate size of an expert; None: intermediate_size
    shared_size: str | None = None  # intermediate size of the shared expert
    shared_count: str | None = None  # or how many expert sizes it has
    shared_gated: bool = False
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: str | bool = True  # a string: the boolean key that decides
    grouped: bool = False  # n_group, topk_group and routed_scaling_factor apply
    corrected: bool = False
    dense_first: str | None = None  # key: so many layers at the start have a plain MLP
    dense_by_step: bool = False  # decoder_sparse_step and mlp_only_layers apply
    extra_layers: str | None = None  # key: so many blocks after the last one serve drafting alone


@dataclass(frozen=True)
class Family:
    """Tensor names are relative to `block` (with {i}), modules without ".weight"."""

    name: str
    architecture: str
    model_types: tuple[str, ...]
    linears: Mapping[str, str]  # role -> module; "{e}" stands for the number of an expert
    norms: Mapping[str, str]
    block: str = "model.layers.{i}."
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    vectors: Mapping[str, str] = field(default_factory=dict)  # role -> full name of a tensor in the block
    fused: tuple[Fused, ...] = ()
    # 3-D tensors (experts, rows, columns) in which transformers 5 holds experts: module -> the linears in its rows
    fused_experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(
        default_factory=dict
    )  # other names of modules, as some versions write them
    keys: Mapping[str, str] = field(default_factory=dict)  # our field -> key of config.json, where it differs
    # key absent from config.json -> value, as transformers
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | str = False  # a string: the boolean key of config.json that decides
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool | str = False
    qk_norm_width: Literal["head", "all"] = "head"
    norm_placement: NormPlacement = "before"
    norm_offset: float = 0.0  # 1: files hold norm weights minus 1
    activation: Activation = "silu"
    rotary_interleaved: bool = False
    local_rope: bool = False  # layers with a window have a RoPE base of their own
    # key of the number whose -1/2 power scales attention, or "=KEY" of the scale itself
    attention_scale: str | None = None
    attention_softcap: str | None = None  # keys of the caps
    logit_softcap: str | None = None
    multipliers: bool = False  # Granite: embedding_multiplier, residual_multiplier, logits_scaling
    embedding_by_width: bool = False  # the embedding is multiplied by the root of the hidden size
    intermediate_halved: bool = False  # Qwen-1 states gate and up together
    # Which layers have sliding_window: none; all; all where use_sliding_window is set ("switched"); where it is set, those that
    # layer_types names or, but for "listed", max_window_layers leaves ("layers"); those that layer_types names, else all but each
    # sliding_window_pattern-th ("pattern").
    window: Literal["none", "all", "switched", "layers", "listed", "pattern"] = "none"
    mixture: Mixture | None = None
