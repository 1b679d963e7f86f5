"""Our `ModelConfig` as GGUF metadata: the inverse of `convert.gguf.config`. Knows no tensors but RoPE's factors."""

from typing import Any

import torch
from torch import Tensor

from convert.config import ModelConfig, RopeScaling
from convert.errors import InputError

WRITTEN = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def architecture_of(config: ModelConfig) -> str:
    """llama.cpp's architecture of a family. Raises InputError where this writer has none."""
    if config.family not in WRITTEN:
        raise InputError(
            f"a {config.family} model is not written as GGUF; families that are: {', '.join(WRITTEN)}. Pack it as awq or "
            "compressed-tensors instead."
        )
    return WRITTEN[config.family]


def model_fields(config: ModelConfig, file_type: int, group_size: int) -> dict[str, Any]:
    """General keys and the sizes of the model. `file_type`: LlamaFileType of llama.cpp."""
    arch = architecture_of(config)
    fields: dict[str, Any] = {
        "general.type": "model",
        "general.quantization_version": 2,
        "general.file_type": file_type,
        "turbomind_quant.group_size": group_size,
        f"{arch}.block_count": config.num_layers,
        f"{arch}.context_length": config.max_position,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": float(config.rope_theta),
        f"{arch}.vocab_size": config.vocab_size,
    }
    if config.num_experts:
        fields[f"{arch}.expert_count"] = config.num_experts
        fields[f"{arch}.expert_used_count"] = config.experts_per_token
    return fields | _scaling_fields(arch, config)


def _scaling_fields(arch: str, config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "llama3":  # the factors of llama3 are a tensor
        return {}
    if scaling.kind not in ("linear", "yarn"):
        raise InputError(f"RoPE scaling {scaling.kind} has no form in GGUF; expected linear, yarn or llama3.")
    if scaling.attention_factor is not None or (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
        raise InputError("yarn with an attention factor or betas of its own has no form in GGUF here.")
    fields: dict[str, Any] = {
        f"{arch}.rope.scaling.type": scaling.kind,
        f"{arch}.rope.scaling.factor": float(scaling.factor),
    }
    if scaling.kind == "yarn":
        fields[f"{arch}.rope.scaling.original_context_length"] = scaling.original_max_position
    return fields


def rope_factors(config: ModelConfig) -> Tensor | None:
    """llama3 scaling as llama.cpp holds it: old / new frequency, float32 (D / 2,). None for other kinds."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    return llama3_factors(config.head_dim, config.rope_theta, scaling).float()


def llama3_factors(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """float64 (D / 2,): 1 for short wavelengths, `factor` for long ones, smooth between (Llama 3.1's rule)."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    wavelength = 2 * torch.pi / frequency
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((scaling.original_max_position / wavelength - low) / (high - low)).clamp(0, 1)
    return 1.0 / ((1 - smooth) / scaling.factor + smooth)
