"""A config.json made from our own configuration, for sources that have none (workspaces of LMDeploy)."""

from typing import Any

from convert.config import ModelConfig
from convert.families.table import BY_NAME
from convert.hf.config_reader import FIELDS


def made_config(config: ModelConfig) -> dict[str, Any]:
    """A config.json from our own configuration."""
    family = BY_NAME[config.family]
    document: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    dense = ("num_experts", "experts_per_token")
    for field, key in FIELDS.items():
        if field in dense and not config.num_experts:
            continue
        document[family.keys.get(field, key)] = getattr(config, field)
    if family.intermediate_halved:
        document["intermediate_size"] = 2 * config.intermediate_size
    for flag, value in ((family.qkv_bias, config.qkv_bias), (family.o_bias, config.o_bias)):
        if isinstance(flag, str):
            document[flag] = value
    if family.window != "none":
        document["sliding_window"] = None  # TurboMind has no window
    scaling = config.rope_scaling
    if family.name == "qwen":
        document |= {
            "use_logn_attn": config.logn_attention,
            "use_dynamic_ntk": scaling is not None,
            "no_bias": True,
        }
        if scaling is not None:
            document |= {
                "seq_length": scaling.original_max_position,
                "max_position_embeddings": config.max_position,
            }
    elif scaling is not None:
        named = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind in ("llama3", "yarn"):
            named["original_max_position_embeddings"] = scaling.original_max_position
        if scaling.kind == "llama3":
            named |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
            }
        if scaling.kind == "yarn":
            named |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
            if scaling.attention_factor is not None:
                named["attention_factor"] = scaling.attention_factor
        document["rope_scaling"] = named
    return document
