"""A Hugging Face config.json becomes a `ModelConfig`: every key that is used is checked, every other one is dropped.

Reads both spellings of RoPE (`rope_theta` + `rope_scaling`, and `rope_parameters` of transformers 5). Runs no code:
`auto_map` of a known family is ignored with a note.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from convert.config import ModelConfig, RopeScaling
from convert.errors import InputError
from convert.families.containers import container_of, language_part
from convert.families.family import Family
from convert.families.other_maths import refuse_lookalike, refuse_unread_keys
from convert.families.table import family_named, family_of
from convert.folder.boundary import reading
from convert.folder.json_files import show_value
from convert.hf.config_reader import FIELDS, LARGEST, ConfigReader
from convert.hf.mixture import parse_mixture
from convert.hf.rope import parse_local_theta, parse_rope, parse_rotary_dim
from convert.linear_layouts.table import parse_quantization
from convert.low_bit.scaled import scaled_format


@reading("config.json")
def parse_config(
    raw: Mapping[str, Any], family_name: str | None = None, true_bits: int | None = None
) -> tuple[ModelConfig, Family, list[str]]:
    """A parsed config.json -> (ModelConfig, family, notes for the user).

    Args:
        family_name: `--family`, which decides instead of `architectures`.
        true_bits: bits that the manifest declares, for int3 and int2 codes held in nibbles.

    Raises InputError naming the key, what it holds and what was expected.
    """
    container = container_of(raw)
    if container is not None and family_name is None:
        raw, family_name = language_part(raw, container)
    family = family_of(raw, family_name)
    read = ConfigReader(raw, family)
    notes: list[str] = []
    if raw.get("auto_map"):
        notes.append("auto_map names code inside the checkpoint: ignored, the forward pass is ours.")

    hidden, heads = read.integer("hidden_size"), read.integer("num_heads")
    kv_heads = _kv_heads(read, heads)
    if raw.get(read.key("head_dim")) is None and "head_dim" not in family.defaults and hidden % heads:
        raise InputError(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is absent."
        )
    head_dim = read.integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise InputError(f"config.json: head_dim is {head_dim}, expected an even number (RoPE turns pairs).")
    if heads % kv_heads:
        raise InputError(
            f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads evenly; expected a divisor."
        )
    inner = read.integer("intermediate_size")
    if family.intermediate_halved:
        if inner % 2:
            raise InputError(f"config.json: intermediate_size {inner} of a {family.name} model must be even.")
        inner //= 2
    layers = read.integer("num_layers")
    max_position = read.integer("max_position")
    theta, scaling = parse_rope(read, max_position)
    if (
        scaling is not None and scaling.kind == "yarn"
    ):  # config.json may still state a context shorter than the stretched one
        stretched = int(min(scaling.original_max_position * scaling.factor, LARGEST["max_position"]))
        max_position = max(max_position, stretched)
    if family.name == "qwen" and scaling is None and read.boolean("use_dynamic_ntk"):
        scaling = RopeScaling("qwen_ntk", 1.0, max_position)  # max_position is seq_length so far
        if raw.get("max_position_embeddings") is not None:
            longest = read.number(raw, "max_position_embeddings", None)
            max_position = max(max_position, int(min(longest, LARGEST["max_position"])))
    window, window_layers = _window(read, layers)
    _refuse_other_maths(raw, family)
    vocab = read.integer("vocab_size")
    bos, eos = _special_ids(read, vocab)
    config = ModelConfig(
        family=family.name,
        architecture=family.architecture,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        norm_eps=read.number(raw, read.key("norm_eps"), float(family.defaults.get("norm_eps", 1e-6))),
        rope_theta=theta,
        max_position=max_position,
        rope_scaling=scaling,
        sliding_window=window,
        window_layers=window_layers,
        tie_embeddings=read.boolean("tie_word_embeddings"),
        qkv_bias=read.flag(family.qkv_bias),
        o_bias=read.flag(family.o_bias),
        mlp_bias=read.flag(family.mlp_bias),
        qk_norm=read.flag(family.qk_norm),
        qk_norm_width=family.qk_norm_width,
        norm_placement=family.norm_placement,
        norm_offset=family.norm_offset,
        activation=family.activation,
        rotary_dim=parse_rotary_dim(read, head_dim),
        rotary_interleaved=family.rotary_interleaved,
        local_rope_theta=parse_local_theta(read),
        attention_scale=_attention_scale(read),
        attention_softcap=read.optional_number(family.attention_softcap),
        logit_softcap=read.optional_number(family.logit_softcap),
        **_multipliers(read, hidden),
        logn_attention=family.name == "qwen" and read.boolean("use_logn_attn"),
        **parse_mixture(read, layers),
        bos_token_id=bos,
        eos_token_ids=eos,
        dtype=_dtype(raw),
        quantization=None if scaled_format(raw) is not None else parse_quantization(raw, true_bits),
    )
    return config, family, notes


def _attention_scale(read: ConfigReader) -> float | None:
    """Factor on the attention scores, where it is not head_dim ** -0.5."""
    key = read.family.attention_scale
    if key is None:
        return None
    if key.startswith("="):
        return read.number(read.raw, key[1:], read.family.defaults.get(key[1:]))
    return float(read.number(read.raw, key, read.family.defaults.get(key)) ** -0.5)


def _multipliers(read: ConfigReader, hidden: int) -> dict[str, Any]:
    """Factors on embedding, residual stream and logits, by field of `ModelConfig`."""
    if read.family.embedding_by_width:
        return {"embedding_scale": float(hidden**0.5)}
    if not read.family.multipliers:
        return {}
    return {
        "embedding_scale": read.number(read.raw, "embedding_multiplier", 1.0),
        "residual_scale": read.number(read.raw, "residual_multiplier", 1.0),
        "logit_scale": 1.0 / read.number(read.raw, "logits_scaling", 1.0),
    }


def _kv_heads(read: ConfigReader, heads: int) -> int:
    key = read.key("num_kv_heads")
    if key in read.raw and read.raw[key] is None:
        return heads
    return read.integer("num_kv_heads", heads)


def _window(read: ConfigReader, layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    rule, raw = read.family.window, read.raw
    if rule == "none" or (
        rule in ("switched", "layers", "listed") and not read.boolean("use_sliding_window")
    ):
        return None, None
    window = raw["sliding_window"] if "sliding_window" in raw else read.family.defaults.get("sliding_window")
    if window is None:
        return None, None
    if isinstance(window, bool) or not isinstance(window, int) or not 0 < window <= 2**31:
        raise InputError(
            f"config.json: sliding_window is {show_value(window)}, expected a whole number above 0."
        )
    if rule in ("all", "switched"):
        return window, None
    types = raw.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
            raise InputError(
                f"config.json: layer_types must list one of {known} for each of the {layers} layers."
            )
        return window, tuple(i for i, t in enumerate(types) if t == "sliding_attention")
    if rule == "listed":
        raise InputError(
            "config.json: use_sliding_window is true, but layer_types does not say for which layers."
        )
    if rule == "pattern":
        every = raw.get("sliding_window_pattern", read.family.defaults.get("sliding_window_pattern"))
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(
                f"config.json: sliding_window_pattern is {show_value(every)}, expected a whole number above 0."
            )
        return window, tuple(i for i in range(layers) if (i + 1) % every)
    first = raw.get("max_window_layers", read.family.defaults.get("max_window_layers"))
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise InputError(f"config.json: max_window_layers is {show_value(first)}, expected a whole number.")
    return window, tuple(range(first, layers))


def _refuse_other_maths(raw: Mapping[str, Any], family: Family) -> None:
    """Keys that would change what the family computes, with the only values that our forward pass has."""
    refuse_lookalike(raw, family)
    refuse_unread_keys(raw, family, FIELDS)
    key = family.keys.get("activation", "hidden_act")
    activation = raw.get(key, family.defaults.get("activation"))
    names = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh", "gelu_tanh")}[family.activation]
    if activation is not None and activation not in names:
        raise InputError(
            f"config.json: {key} {show_value(activation)}: a {family.name} model here has {names[0]}."
        )
    if raw.get("use_bidirectional_attention"):
        raise InputError("config.json: use_bidirectional_attention: only causal models are supported.")
    if family.name == "qwen":
        if raw.get("no_bias") not in (None, True):
            raise InputError("config.json: no_bias false: Qwen models with further biases are not supported.")
        if raw.get("scale_attn_weights") not in (None, True):
            raise InputError("config.json: scale_attn_weights false is not supported.")


def _special_ids(read: ConfigReader, vocab: int) -> tuple[int | None, tuple[int, ...]]:
    def ids(key: str) -> tuple[int, ...]:
        value = read.raw[key] if key in read.raw else read.family.defaults.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int):
                raise InputError(
                    f"config.json: {key} is {show_value(value)}, expected a token id or a list of them."
                )
        # -1 and ids beyond the vocabulary stand in published configs for "none"
        return tuple(dict.fromkeys(item for item in items if 0 <= item < vocab))

    bos = ids("bos_token_id")
    return (bos[0] if bos else None), ids("eos_token_id")


def _dtype(raw: Mapping[str, Any]) -> Literal["float16", "bfloat16", "float32"]:
    name = raw.get("dtype", raw.get("torch_dtype"))
    if isinstance(name, str):
        name = name.removeprefix("torch.")
    if name == "float16":
        return "float16"
    if name == "bfloat16":
        return "bfloat16"
    if name is None or name in ("float32", "auto", "float64"):
        return "float32"
    raise InputError(f"config.json: dtype {show_value(name)}, expected float16, bfloat16 or float32.")


def updated_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A copy of config.json whose sizes are those of `config`, which padding may have changed."""
    family = family_named(config.family)
    document = dict(raw)
    if config.tree is not None and config.tree.config_key is not None:
        key = config.tree.config_key
        inner = updated_config(raw[key], replace(config, tree=None))
        return document | {key: inner}
    sizes: dict[str, int | float] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size * (2 if family.intermediate_halved else 1),
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "norm_eps": config.norm_eps,
        "head_dim": config.head_dim,
    }
    mixture = family.mixture
    if mixture is not None and mixture.size is not None:
        document[mixture.size] = config.expert_intermediate_size
        if mixture.shared_size is not None:
            document[mixture.shared_size] = config.shared_intermediate_size
    for field, value in sizes.items():
        key = family.keys.get(field, FIELDS[field])
        implied = {"num_kv_heads": config.num_heads, "head_dim": config.hidden_size // config.num_heads}
        if key in document or implied.get(field) != value:
            document[key] = value
    if "tie_word_embeddings" in document:  # it may say so of a head that is another one
        document["tie_word_embeddings"] = config.tie_embeddings
    return document
