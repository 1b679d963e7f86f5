"""The architectures that are read from GGUF, one row each: names of tensors, metadata keys, and what llama.cpp takes for granted.

Names and keys are those of the gguf package (constants.py, tensor_mapping.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GgufArchitecture:
    """Names of tensors are without "blk.N." and ".weight"; modules are those of the family, relative to its block."""

    architecture: str
    model_type: str
    permuted: bool = False  # llama.cpp stores the rows of q and k as interleaved pairs
    may_have_bias: bool = False  # q, k, v have biases where the file holds them
    mixture: tuple[str, str] | None = None  # architecture and model_type of the same with experts
    tensors: Mapping[str, str] = field(default_factory=dict)  # beside or in place of the usual ones
    stacked: Mapping[str, str] = field(
        default_factory=dict
    )  # experts: one 3-D tensor -> a module for each, with {e}
    keys: Mapping[str, str] = field(default_factory=dict)  # metadata key -> key of config.json
    constants: Mapping[str, Any] = field(default_factory=dict)  # of config.json
    read: tuple[str, ...] = ()  # further metadata keys that are understood
    norm_offset: float = 0.0  # the file holds norms with this added
    partial_rotary: bool = False
    wide_layers: int | None = (
        None  # Gemma: layers of the one model whose attention is scaled by another width
    )


_MIXTRAL = {
    "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
}
_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}
_GEMMA_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_KEYS = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}

ARCHITECTURES = {
    "llama": GgufArchitecture(
        "LlamaForCausalLM",
        "llama",
        permuted=True,
        may_have_bias=True,
        mixture=("MixtralForCausalLM", "mixtral"),
        tensors={"ffn_gate_inp": "block_sparse_moe.gate"},
        stacked=_MIXTRAL,
    ),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": GgufArchitecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        mixture=("Qwen3MoeForCausalLM", "qwen3_moe"),
        tensors={"ffn_gate_inp": "mlp.gate"},
        stacked=_EXPERTS,
        keys={"expert_feed_forward_length": "moe_intermediate_size"},
        constants={"norm_topk_prob": True},
    ),
    "gemma2": GgufArchitecture(
        "Gemma2ForCausalLM",
        "gemma2",
        tensors=_GEMMA_NORMS,
        keys=_GEMMA_KEYS,
        norm_offset=1.0,
        wide_layers=46,
    ),
    "gemma3": GgufArchitecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        tensors=_GEMMA_NORMS,
        keys=_GEMMA_KEYS | {"rope.freq_base_swa": "rope_local_base_freq"},
        norm_offset=1.0,
        wide_layers=62,
    ),
    "phi3": GgufArchitecture(
        "Phi3ForCausalLM",
        "phi3",
        tensors={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        keys=_WINDOW,
        read=("rope.scaling.attn_factor",),
        partial_rotary=True,
    ),
    "glm4": GgufArchitecture(
        "Glm4ForCausalLM",
        "glm4",
        may_have_bias=True,
        tensors={
            "ffn_up": "mlp.gate_up_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        partial_rotary=True,
    ),
    "olmo2": GgufArchitecture(
        "Olmo2ForCausalLM",
        "olmo2",
        tensors={
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    "granite": GgufArchitecture(
        "GraniteForCausalLM",
        "granite",
        permuted=True,
        may_have_bias=True,
        keys={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
}
