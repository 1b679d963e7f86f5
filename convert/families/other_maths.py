"""What shows that a model computes something that its family's row does not: architectures that look alike, and keys of config.json.

A key that the row reads is understood. One of the keys here that it does not read, with a value that changes the function, is refused
by name, with `--family` as well.
"""

import re
from collections.abc import Mapping
from typing import Any

from convert.errors import InputError
from convert.families.family import Family
from convert.folder.json_files import show, show_value

# Architectures that no row computes, each with what it has and no row has. Many have tensors of the names and shapes of a known
# family.
LOOKALIKES = {
    "GptOssForCausalLM": "attention sinks, and experts that are published in MXFP4",
    "DeepseekV2ForCausalLM": "attention over latent vectors",
    "DeepseekV3ForCausalLM": "attention over latent vectors",
    "DeepseekV32ForCausalLM": "attention over latent vectors, for chosen tokens alone",
    "Qwen3NextForCausalLM": "linear attention in most layers",
    "Gemma3nForConditionalGeneration": "embeddings in every layer, and layers that share keys and values",
    "GraniteMoeForCausalLM": "experts in fused tensors of an order of their own",
    "PhimoeForCausalLM": "a router that masks by a threshold, and norms with biases",
    "Llama4ForConditionalGeneration": "layers without RoPE and another attention",
    "SmolLM3ForCausalLM": "layers without RoPE",
    "Ernie4_5ForCausalLM": "RoPE on interleaved pairs",
    "Ernie4_5_ForCausalLM": "RoPE on interleaved pairs",
    "MiniCPMForCausalLM": "factors on embedding, residual stream and logits",
    "CohereForCausalLM": "parallel blocks and RoPE on interleaved pairs",
    "Cohere2ForCausalLM": "parallel blocks and layers without RoPE",
    "OlmoForCausalLM": "norms without weights",
    "NemotronForCausalLM": "another norm and activation",
    "ArceeForCausalLM": "another activation, without a gate",
    "ApertusForCausalLM": "another activation, without a gate",
    "Starcoder2ForCausalLM": "another norm and MLP",
    "StableLmForCausalLM": "another norm and partial RoPE",
    "GemmaForCausalLM": "norm weights minus 1 and a scaled embedding",
    "HunYuanDenseV1ForCausalLM": "norms of q and k after RoPE",
    "DeciLMForCausalLM": "blocks that differ by layer",
    "Llama4ForCausalLM": "layers without RoPE and another attention",
    "BaichuanForCausalLM": "one matrix for q, k, v, and ALiBi in its larger size",
    "Exaone4ForCausalLM": "layers without RoPE and norms after the block",
}
_TYPES = {re.sub(r"_?forcausallm", "", name.lower()): reason for name, reason in LOOKALIKES.items()}

# Keys that change the function wherever they appear, by parts of their names.
_PATTERN = re.compile(
    r"multiplier|soft_?cap|logits?_scal|embedding_scal|residual_scal|attention_scal|scale_(emb|depth)|dim_model_base|"
    r"(^|_)mup|(^|_)nope|no_rope|interleave|alibi|clip_qkv|clamp|query_pre_attn|attn_temperature|use_qk_norm|qk_layernorm|"
    r"parallel_(residual|attn)|cross_attention|bidirectional|(kv|q)_lora_rank|layer_scale|attention_chunk|block_sparse"
)
# numbers that scale and are neutral at 1; every other key is neutral where it is absent, null, false, 0 or empty
_FACTOR = re.compile(r"multiplier|scal|mup")
_NORMS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "rms_norm_eps")
_EXPERTS = re.compile(r"(num|n)_(local_|routed_|shared_)?experts$|moe_num_experts")
_MULTIPLIERS = {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}
ROPE_KEYS = {  # of rope_scaling and rope_parameters: read, or without effect on text
    *(
        "rope_type",
        "type",
        "factor",
        "rope_theta",
        "base",
        "original_max_position_embeddings",
        "low_freq_factor",
    ),
    *(
        "high_freq_factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    *(
        "short_factor",
        "long_factor",
        "partial_rotary_factor",
        "mrope_section",
        "mrope_interleaved",
        "finetuned",
    ),
    *("full_attention", "sliding_attention", "max_position_embeddings"),
}
ROPE_NEUTRAL = {"extrapolation_factor": (1, 1.0), "attn_factor": (1, 1.0)}


def refuse_lookalike(raw: Mapping[str, Any], family: Family) -> None:
    """Raises InputError where the architecture is one that no row computes, although its tensors fit."""
    architectures = raw.get("architectures")
    for name in architectures if isinstance(architectures, list) else []:
        if isinstance(name, str) and name in LOOKALIKES:
            raise InputError(
                f"config.json: {name} is not a {family.name} model, although its tensors have the same names: it has "
                f"{LOOKALIKES[name]}. --family cannot help; the results would be wrong."
            )
    kind = raw.get("model_type")
    if not architectures and isinstance(kind, str) and kind in _TYPES:
        raise InputError(
            f"config.json: model_type {kind!r} is not a {family.name} model: it has {_TYPES[kind]}. --family cannot help; the results "
            "would be wrong."
        )


def refuse_unread_keys(raw: Mapping[str, Any], family: Family, fields: Mapping[str, str]) -> None:
    """Raises InputError naming the keys that change what a model computes and that the family's row does not read.

    Args:
        fields: our field -> key of config.json, for families that do not say otherwise.
    """
    known = _understood(family, fields)
    odd = []
    for key, value in raw.items():
        if key in known or _is_neutral(key, value):
            continue
        if _PATTERN.search(key) or (_EXPERTS.search(key) and family.mixture is None and value != 1):
            odd.append(f"{show(key, 60)} = {show_value(value, 40)}")
    if not any(raw.get(key) is not None for key in (family.keys.get("norm_eps", fields["norm_eps"]),)):
        odd += [f"{key} = {show_value(raw[key], 40)}" for key in _NORMS if raw.get(key) is not None]
    odd += _odd_layers(raw, family)
    for part in ("rope_scaling", "rope_parameters"):
        odd += [f"{part}.{text}" for text in _odd_rope_keys(raw.get(part))]
    if odd:
        raise InputError(
            f"config.json has {len(odd)} keys that change what the model computes and that a {family.name} model does not have here: "
            f"{', '.join(odd[:6])}{', ...' if len(odd) > 6 else ''}. Its results would be wrong, so it is not read."
        )


def _understood(family: Family, fields: Mapping[str, str]) -> set[str]:
    named = (
        *(family.qkv_bias, family.o_bias, family.mlp_bias, family.qk_norm),
        *(family.attention_scale, family.attention_softcap, family.logit_softcap),
    )
    known = {
        *fields.values(),
        *family.keys.values(),
        *(n.removeprefix("=") for n in named if isinstance(n, str)),
    }
    if family.multipliers:
        known |= _MULTIPLIERS
    if family.mixture is not None:
        known |= {value for value in vars(family.mixture).values() if isinstance(value, str)}
    else:
        known = {key for key in known if not _EXPERTS.search(key)}
    return known | set(family.defaults)


def _is_neutral(key: str, value: Any) -> bool:
    if value is None or value is False or value in ("", [], {}):
        return True
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value == 0 or bool(value == 1 and _FACTOR.search(key))
    return key == "no_rope_layers" and isinstance(value, list) and all(item == 1 for item in value)


def _odd_layers(raw: Mapping[str, Any], family: Family) -> list[str]:
    """layer_types with kinds of layers that the row has not, and a window where the row has none."""
    types = raw.get("layer_types")
    kinds = {str(kind) for kind in types} if isinstance(types, list) else set()
    allowed = {"full_attention"} if family.window == "none" else {"full_attention", "sliding_attention"}
    odd = [f"layer_types with {show(kind, 40)}" for kind in sorted(kinds - allowed)]
    window, longest = raw.get("sliding_window"), raw.get("max_position_embeddings")
    if family.window == "none" and isinstance(window, int) and not isinstance(window, bool):
        is_used = raw.get("use_sliding_window") is not False
        if is_used and isinstance(longest, int) and 0 < window < longest:
            odd.append(f"sliding_window = {window}")
    return odd


def _odd_rope_keys(params: Any) -> list[str]:
    if not isinstance(params, dict):
        return []
    found = []
    for key, value in params.items():
        if key in ROPE_KEYS or value in ROPE_NEUTRAL.get(key, (None, False, 0)):
            continue
        found.append(f"{show(str(key), 40)} = {show_value(value, 40)}")
    return found
