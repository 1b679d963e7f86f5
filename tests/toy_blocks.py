"""Small random blocks of several families, and streams whose channels differ in size: what the search tests run on."""

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import ModelConfig, Router
from convert.families.table import bias_roles, linear_shapes, norm_shapes, vector_shapes

SHAPES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "qkv_bias": True},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "qk_norm": True},
    "internlm": {"architecture": "InternLMForCausalLM", "qkv_bias": True, "o_bias": True, "num_kv_heads": 4},
    "mixtral": {"architecture": "MixtralForCausalLM", "num_experts": 4, "experts_per_token": 2},
    "gemma2": {
        "norm_placement": "around",
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "attention_softcap": 3.0,
        "attention_scale": 0.1,
    },
    "gemma3": {
        "norm_placement": "around",
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "qk_norm": True,
        "local_rope_theta": 100.0,
        "sliding_window": 9,
        "window_layers": (0,),
    },
    "glm4": {"norm_placement": "around", "rotary_dim": 16, "rotary_interleaved": True, "qkv_bias": True},
    "olmo2": {"norm_placement": "after", "qk_norm": True, "qk_norm_width": "all"},
    "granite": {"residual_scale": 0.3, "attention_scale": 0.2, "embedding_scale": 3.0, "logit_scale": 0.5},
    "qwen2_moe": {
        "num_experts": 4,
        "experts_per_token": 2,
        "expert_intermediate_size": 64,
        "shared_intermediate_size": 128,
        "shared_gated": True,
        "router": Router(renormalize=False),
    },
    "glm4_moe": {
        "num_experts": 8,
        "experts_per_token": 2,
        "expert_intermediate_size": 64,
        "shared_intermediate_size": 64,
        "router": Router("sigmoid", True, 4, 2, 1.5, corrected=True),
    },
}


def config_of(family: str) -> ModelConfig:
    values: dict[str, object] = {
        "family": family,
        "architecture": "LlamaForCausalLM",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "vocab_size": 64,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position": 512,
    }
    return ModelConfig(**{**values, **SHAPES[family]})  # type: ignore[arg-type]


def block_of(config: ModelConfig, seed: int = 0) -> BlockWeights:
    generator = torch.Generator().manual_seed(seed)
    linears = {}
    for role, (rows, cols) in linear_shapes(config).items():
        bias = torch.randn(rows, generator=generator) * 0.1 if role in bias_roles(config) else None
        linears[role] = LinearWeights(torch.randn(rows, cols, generator=generator) * cols**-0.5, bias)
    norms = {
        role: (1 + 0.2 * torch.randn(*shape, generator=generator)).half().float()
        for role, shape in norm_shapes(config).items()
    }
    vectors = {
        role: torch.randn(*shape, generator=generator) * 0.1 for role, shape in vector_shapes(config).items()
    }
    return BlockWeights(0, linears, norms, vectors, config.norm_offset)


def stream_of(config: ModelConfig, samples: int = 32, length: int = 48, seed: int = 1) -> Tensor:
    """(S, L, H) with channels of very different size, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(1.2 * torch.randn(config.hidden_size, generator=generator))
    return torch.randn(samples, length, config.hidden_size, generator=generator) * size
