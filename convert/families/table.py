"""Model families as rows of data: names of tensors and config keys, defaults, biases. Adding a family is adding a row.

Knows no files. Roles of a decoder block's linears: q, k, v, o, gate, up, down; Mixtral: router, experts.{e}.gate|up|down.
Roles of its norms: attn_norm, mlp_norm, q_norm, k_norm.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from convert.config import ModelConfig
from convert.errors import InputError

# How a fused tensor's rows hold q, k, v. "thirds": all q, all k, all v. "grouped": for each KV head its q heads, k, v.
FusedLayout = Literal["thirds", "grouped"]


@dataclass(frozen=True)
class Family:
    """One row of the table. Tensor names are relative to `block` (with {i}), modules without ".weight"."""

    name: str
    architecture: str
    model_types: tuple[str, ...]
    linears: Mapping[str, str]  # role -> module; "{e}" stands for the number of an expert
    norms: Mapping[str, str]
    block: str = "model.layers.{i}."
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    fused: str | None = None  # module whose rows hold q, k and v together
    fused_layout: FusedLayout = "thirds"
    keys: Mapping[str, str] = field(default_factory=dict)  # our field -> key of config.json, where it differs
    defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # key absent from config.json -> value, as transformers
    qkv_bias: bool | str = False  # a string: the boolean key of config.json that decides
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    intermediate_halved: bool = False  # Qwen-1 states gate and up together
    window: Literal["none", "all", "layers"] = "none"  # how sliding_window applies


_LLAMA_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_LLAMA_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

FAMILIES: tuple[Family, ...] = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        model_types=("llama",),
        linears=_LLAMA_LINEARS,
        norms=_LLAMA_NORMS,
        defaults={"max_position": 2048, "bos_token_id": 1, "eos_token_id": 2},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        model_types=("mistral",),
        linears=_LLAMA_LINEARS,
        norms=_LLAMA_NORMS,
        defaults={
            "num_kv_heads": 8,
            "max_position": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        window="all",
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        model_types=("qwen2",),
        linears=_LLAMA_LINEARS,
        norms=_LLAMA_NORMS,
        defaults={
            "num_kv_heads": 32,
            "max_position": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        qkv_bias=True,
        window="layers",
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        model_types=("qwen3",),
        linears=_LLAMA_LINEARS,
        norms={**_LLAMA_NORMS, **_QK_NORMS},
        defaults={
            "num_kv_heads": 32,
            "head_dim": 128,
            "max_position": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        window="layers",
    ),
    Family(
        name="internlm",
        architecture="InternLMForCausalLM",
        model_types=("internlm",),
        linears=_LLAMA_LINEARS,
        norms=_LLAMA_NORMS,
        defaults={"max_position": 2048, "bias": True, "bos_token_id": 1, "eos_token_id": 2},
        qkv_bias="bias",
        o_bias="bias",
    ),
    Family(
        name="internlm2",
        architecture="InternLM2ForCausalLM",
        model_types=("internlm2",),
        linears={
            "o": "attention.wo",
            "gate": "feed_forward.w1",
            "up": "feed_forward.w3",
            "down": "feed_forward.w2",
        },
        norms={"attn_norm": "attention_norm", "mlp_norm": "ffn_norm"},
        embedding="model.tok_embeddings",
        lm_head="output",
        fused="attention.wqkv",
        fused_layout="grouped",
        defaults={"max_position": 2048, "bias": False, "bos_token_id": 1, "eos_token_id": 2},
        qkv_bias="bias",
        o_bias="bias",
    ),
    Family(
        name="qwen",
        architecture="QWenLMHeadModel",
        model_types=("qwen",),
        linears={"o": "attn.c_proj", "gate": "mlp.w2", "up": "mlp.w1", "down": "mlp.c_proj"},
        norms={"attn_norm": "ln_1", "mlp_norm": "ln_2"},
        block="transformer.h.{i}.",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        fused="attn.c_attn",
        keys={
            "head_dim": "kv_channels",
            "norm_eps": "layer_norm_epsilon",
            "rope_theta": "rotary_emb_base",
            # beyond seq_length Qwen-1 changes its RoPE base by a rule of its own (use_dynamic_ntk); without that rule
            # its context ends there
            "max_position": "seq_length",
        },
        # generation ends on the end of text and on the end of a chat turn; config.json names neither
        defaults={"max_position": 2048, "eos_token_id": [151643, 151645]},
        qkv_bias=True,
        intermediate_halved=True,
    ),
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        model_types=("mixtral",),
        linears={
            **{role: _LLAMA_LINEARS[role] for role in ("q", "k", "v", "o")},
            "router": "block_sparse_moe.gate",
            "experts.{e}.gate": "block_sparse_moe.experts.{e}.w1",
            "experts.{e}.up": "block_sparse_moe.experts.{e}.w3",
            "experts.{e}.down": "block_sparse_moe.experts.{e}.w2",
        },
        norms=_LLAMA_NORMS,
        defaults={
            "num_kv_heads": 8,
            "max_position": 131072,
            "norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_experts": 8,
            "experts_per_token": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        window="all",
    ),
)

BY_NAME = {family.name: family for family in FAMILIES}


def family_named(name: str) -> Family:
    """The family with this name. Raises InputError naming the nearest known one."""
    if name in BY_NAME:
        return BY_NAME[name]
    near = difflib.get_close_matches(name.lower(), BY_NAME, n=1, cutoff=0.3)
    hint = f" The nearest known name is {near[0]!r}." if near else ""
    raise InputError(f"Unknown model family {name[:80]!r}.{hint} Known families: {', '.join(BY_NAME)}.")


def family_of(raw: Mapping[str, Any], override: str | None = None) -> Family:
    """The family of a parsed config.json, by architecture, else by model_type; `override` (--family) decides instead.

    Raises InputError for an unknown one, naming the nearest known architecture and the switch.
    """
    if override is not None:
        return family_named(override)
    architectures = raw.get("architectures")
    names = [a for a in architectures if isinstance(a, str)] if isinstance(architectures, list) else []
    for family in FAMILIES:
        if family.architecture in names:
            return family
    model_type = raw.get("model_type")
    if not names:
        for family in FAMILIES:
            if model_type in family.model_types:
                return family
    found = names[0] if names else str(model_type or "none")
    known = {family.architecture.lower(): family for family in FAMILIES}
    known.update({family.name: family for family in FAMILIES})
    near = difflib.get_close_matches(found.lower(), known, n=1, cutoff=0.4)
    hint = f" The nearest known one is {known[near[0]].architecture}" if near else " Nothing known is near it"
    flag = f" (--family {known[near[0]].name})" if near else ""
    code = (
        " Its auto_map names code inside the checkpoint, which is never run."
        if isinstance(raw.get("auto_map"), dict)
        else ""
    )
    raise InputError(
        f"config.json: architecture {found[:80]!r} is not a known family.{hint}{flag}.{code} Known families: "
        f"{', '.join(BY_NAME)}. If the model computes exactly what one of them does, name it with --family."
    )


def linear_modules(family: Family, config: ModelConfig) -> dict[str, str]:
    """Role -> module name inside the block, in a fixed order. q, k, v of a fused family are not listed."""
    modules: dict[str, str] = {}
    for role, module in family.linears.items():
        if "{e}" in role:
            continue
        modules[role] = module
    for expert in range(config.num_experts):
        for role, module in family.linears.items():
            if "{e}" in role:
                modules[role.format(e=expert)] = module.format(e=expert)
    return modules


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Role -> (N, K) of every linear of a block, q first."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    if not config.num_experts:
        return shapes | {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    shapes["router"] = (config.num_experts, hidden)
    for expert in range(config.num_experts):
        shapes[f"experts.{expert}.gate"] = (inner, hidden)
        shapes[f"experts.{expert}.up"] = (inner, hidden)
        shapes[f"experts.{expert}.down"] = (hidden, inner)
    return shapes


def norm_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Role -> shape of every norm weight of a block."""
    shapes: dict[str, tuple[int]] = {"attn_norm": (config.hidden_size,), "mlp_norm": (config.hidden_size,)}
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    return shapes


def bias_roles(config: ModelConfig) -> set[str]:
    """Roles of the linears that have a bias."""
    roles: set[str] = set()
    if config.qkv_bias:
        roles |= {"q", "k", "v"}
    if config.o_bias:
        roles.add("o")
    if config.mlp_bias:
        roles |= {"gate", "up", "down"}
    return roles


def scale_groups(config: ModelConfig) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Pairs (previous operation, linears that read it) into which per-channel scales fold, as AWQ publishes them.

    v -> o has one scale per KV channel, shared by its query heads. The router reads the same norm as the experts.
    """
    if not config.num_experts:
        return (
            ("attn_norm", ("q", "k", "v")),
            ("v", ("o",)),
            ("mlp_norm", ("gate", "up")),
            ("up", ("down",)),
        )
    experts = range(config.num_experts)
    readers = tuple(f"experts.{e}.{part}" for e in experts for part in ("gate", "up"))
    return (
        ("attn_norm", ("q", "k", "v")),
        ("v", ("o",)),
        ("mlp_norm", ("router", *readers)),
        *((f"experts.{e}.up", (f"experts.{e}.down",)) for e in experts),
    )
