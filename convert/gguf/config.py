"""The metadata of a GGUF file as a config.json: sizes, RoPE, special tokens. A row for each architecture that is read."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert.config import RopeScaling
from convert.errors import InputError
from convert.folder.json_files import show, show_value
from convert.gguf.architectures import ARCHITECTURES, GgufArchitecture
from convert.gguf.kinds import refuse_other_kinds
from convert.gguf.metadata import llama3_factors
from convert.gguf.parts import GgufModel
from convert.tokenizer.sentencepiece import CONTROL

TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")
YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}


def read_config(file: str, model: GgufModel) -> tuple[GgufArchitecture, dict[str, Any]]:
    """(row, config.json) of a GGUF model. Raises InputError where it is no model or of an architecture that is not read."""
    refuse_other_kinds(file, model.fields)
    name = model.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(
            f"{show(file)} has architecture {show_value(name)}; known: {', '.join(ARCHITECTURES)}. Use the model's safetensors."
        )
    row = ARCHITECTURES[name]
    return row, gguf_config(file, name, row, model.fields, model.tensors)


def gguf_config(
    file: str, arch: str, row: GgufArchitecture, fields: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    def need(key: str) -> Any:
        value = fields.get(f"{arch}.{key}")
        if value is None:
            raise InputError(
                f"{show(file)}: the metadata key {arch}.{key} is missing. Download the file again."
            )
        return value

    experts = fields.get(f"{arch}.expert_count") or 0
    if experts and row.mixture is None:
        raise InputError(
            f"{show(file)}: mixtures of experts of the architecture {show(arch)} are not read from GGUF. Use the model's "
            "safetensors."
        )
    if "token_embd.weight" not in tensors:
        raise InputError(f"{show(file)} holds no token_embd.weight. Download it again.")
    hidden, heads = need("embedding_length"), need("attention.head_count")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise InputError(f"{show(file)}: head counts that differ by layer are not supported.")
    head_dim = fields.get(f"{arch}.attention.key_length", hidden // heads)
    rotated = fields.get(f"{arch}.rope.dimension_count", head_dim)
    if rotated != head_dim and not row.partial_rotary:
        raise InputError(f"{show(file)}: only part of each head is rotated; that is not supported.")
    matrices = [t.tensor_type.name for n, t in tensors.items() if len(t.shape) == 2]
    dtype = {frozenset({"F16"}): "float16", frozenset({"BF16"}): "bfloat16"}.get(
        frozenset(matrices), "float32"
    )
    config: dict[str, Any] = {
        "architectures": [row.architecture],
        "model_type": row.model_type,
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _short(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(fields.get(f"{arch}.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": row.may_have_bias and "blk.0.attn_q.bias" in tensors,
        "dtype": dtype,
    }
    config |= _particulars(arch, row, fields, config)
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    scaling = _rope_scaling(file, arch, fields, tensors, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if experts and row.mixture is not None:
        config["architectures"], config["model_type"] = [row.mixture[0]], row.mixture[1]
        config["num_local_experts"] = experts
        config["num_experts_per_tok"] = need("expert_used_count")
    for ours, theirs in (("bos", "bos"), ("pad", "padding")):
        value = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if value is not None:
            config[f"{ours}_token_id"] = value
    ends = end_ids(fields)
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return config


def _particulars(
    arch: str, row: GgufArchitecture, fields: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """What the row of the architecture adds to config.json."""
    found = dict(row.constants)
    for name, key in row.keys.items():
        value = fields.get(f"{arch}.{name}")
        if value is not None:
            found[key] = _short(value) if isinstance(value, float) else value
    if row.wide_layers is not None:
        # llama.cpp's own rule: the largest model of the series divides by the width of its heads if they filled the hidden state
        is_largest = config["num_hidden_layers"] == row.wide_layers
        filled = config["hidden_size"] // config["num_attention_heads"]
        found["query_pre_attn_scalar"] = filled if is_largest else config["head_dim"]
    return found


def end_ids(fields: Mapping[str, Any]) -> list[int]:
    """Ids that end an answer: end of text, end of a turn, end of a message, and control tokens that are known to end a turn.

    Chat models often state the end of text as eos, while an answer ends with the end of a turn.
    """
    stated = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens, kinds = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, list) and len(tokens) == len(kinds):
        control = {t: i for i, (t, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == CONTROL}
        stated += [control[text] for text in TURN_ENDS if text in control]
    return list(dict.fromkeys(index for index in stated if index is not None))


def _short(value: float) -> float:
    """The shortest decimal that rounds to the same float32: metadata holds 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    file: str, arch: str, fields: Mapping[str, Any], tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    kind = fields.get(f"{arch}.rope.scaling.type")
    factor = fields.get(f"{arch}.rope.scaling.factor")
    original = fields.get(f"{arch}.rope.scaling.original_context_length")
    if "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
        return _longrope(arch, fields, tensors)
    if "rope_freqs.weight" in tensors:
        return _llama3_scaling(file, torch.from_numpy(np.array(tensors["rope_freqs.weight"].data)), config)
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn") or not factor:
        raise InputError(
            f"{show(file)}: RoPE scaling {show_value(kind)} is not supported; expected linear or yarn."
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _short(factor)}
    if kind == "yarn" and original:
        scaling["original_max_position_embeddings"] = original
    if kind == "yarn":
        for name, key in YARN.items():
            value = fields.get(f"{arch}.rope.scaling.{name}")
            if value is not None:
                scaling[key] = _short(value)
    return scaling


def _longrope(arch: str, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Phi-3's two lists of divisors, which are tensors in the file."""
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    for length in ("short", "long"):
        values = np.array(tensors[f"rope_factors_{length}.weight"].data, dtype=np.float32)
        scaling[f"{length}_factor"] = [_short(value) for value in values.flatten().tolist()]
    original = fields.get(f"{arch}.rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    attention = fields.get(f"{arch}.rope.scaling.attn_factor")
    if attention:
        scaling["attention_factor"] = _short(attention)
    return scaling


def _llama3_scaling(file: str, factors: Tensor, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3.1 and 3.2 store the quotient old / new frequency; the published parameters that give it are looked up."""
    for factor in (8.0, 16.0, 32.0):
        low, high, original = 1.0, 4.0, 8192
        scaling = RopeScaling("llama3", factor, original, low, high)
        expected = llama3_factors(config["head_dim"], config["rope_theta"], scaling)
        if factors.shape == expected.shape and torch.allclose(factors.double(), expected, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise InputError(
        f"{show(file)}: its RoPE frequency factors follow no published rule. Use the model's safetensors."
    )
