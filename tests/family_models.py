"""Tiny random transformers models of the newer families, every option set to a value that differs from its default, as folders."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from convert.readers import open_checkpoint
from engine.model.forward import Model, causal_attend

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 160,
    "rms_norm_eps": 3e-5,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
MIXTURE: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        MIXTURE
        | {
            "num_experts": 5,
            "shared_expert_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "qkv_bias": False,
            "rope_parameters": ROPE,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        MIXTURE
        | {
            "num_experts": 6,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 4,
            "attention_bias": True,
            "rope_parameters": ROPE,
            "use_sliding_window": True,
            "sliding_window": 9,
        },
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        MIXTURE
        | {
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": False,
            "first_k_dense_replace": 2,
            "use_qk_norm": True,
            "attention_bias": True,
            "rope_parameters": ROPE | {"partial_rotary_factor": 0.25},
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            "query_pre_attn_scalar": 100,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 7,
            "attention_bias": True,
            "rope_parameters": ROPE,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "query_pre_attn_scalar": 100,
            "final_logit_softcapping": 3.0,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 80000.0},
            },
        },
    ),
    "phi3": (
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 24,
            "sliding_window": 30,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 5000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 9.0],
            },
        },
    ),
    "glm4": (
        "Glm4ForCausalLM",
        {"attention_bias": True, "rope_parameters": ROPE | {"partial_rotary_factor": 0.25}},
    ),
    "olmo2": ("Olmo2ForCausalLM", {"attention_bias": True, "head_dim": 16, "rope_parameters": ROPE}),
    "granite": (
        "GraniteForCausalLM",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 3.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "head_dim": 16,
            "rope_parameters": ROPE,
        },
    ),
}


def make_model(family: str, **changes: Any) -> Any:
    """A float32 model whose weights are wide enough that every part moves the logits."""
    name, options = MODELS[family]
    architecture = getattr(transformers, name)
    keys = SIZES | options | changes
    torch.manual_seed(0)
    model = architecture(architecture.config_class(**keys, attn_implementation="eager")).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: Any) -> None:
    """Random weights: norms around what multiplies with 1, products that keep the size of what they read."""
    offset = type(model).__name__.startswith("Gemma")
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "correction" in n)]
    for name, tensor in tensors:
        if "norm" in name and tensor.dim() == 1:
            tensor.uniform_(-0.5, 0.5).add_(0.0 if offset else 1.0)
        elif name.endswith("bias"):
            tensor.normal_(std=0.3)
        elif "embed" in name:
            tensor.normal_(std=0.5)
        else:
            tensor.normal_(std=tensor.shape[-1] ** -0.5)


def save_model(family: str, folder: Path, **changes: Any) -> Any:
    """Write a model's folder as transformers publishes it; returns the model."""
    model = make_model(family, **changes)
    model.save_pretrained(folder)
    return model


TOLERANCE = 1e-4  # absolute, on logits of size about 1: float32 sums in another order


def logits_of(model: Model, ids: Tensor) -> Tensor:
    """ids (B, L) -> (B, L, V)."""
    batch, length = ids.shape
    positions = torch.arange(length, device=ids.device).repeat(batch)
    return model(ids.flatten(), positions, causal_attend(batch, length, model.config)).view(batch, length, -1)


def read(folder: Path) -> Model:
    return Model.from_checkpoint(open_checkpoint(folder), "cpu", torch.float32)
