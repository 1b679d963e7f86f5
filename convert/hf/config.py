"""A Hugging Face config.json becomes a `ModelConfig`: every key that is used is checked, every other one is dropped.

Reads both spellings of RoPE (`rope_theta` + `rope_scaling`, and `rope_parameters` of transformers 5). Runs no code:
`auto_map` of a known family is ignored with a note.
"""

from collections.abc import Mapping
from typing import Any, Literal

from convert.config import ModelConfig, RopeScaling
from convert.errors import InputError
from convert.families.table import Family, family_named, family_of
from convert.folder.json_files import show
from convert.hf.config_reader import FIELDS, LARGEST, ConfigReader
from convert.hf.rope import parse_rope
from convert.linear_layouts.table import parse_quantization


def parse_config(
    raw: Mapping[str, Any], family_name: str | None = None, true_bits: int | None = None
) -> tuple[ModelConfig, Family, list[str]]:
    """A parsed config.json -> (ModelConfig, family, notes for the user).

    Args:
        family_name: `--family`, which decides instead of `architectures`.
        true_bits: bits that the manifest declares, for int3 and int2 codes held in nibbles.

    Raises InputError naming the key, what it holds and what was expected.
    """
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
    if scaling is not None and scaling.kind == "yarn" and max_position <= scaling.original_max_position:
        max_position = int(scaling.original_max_position * scaling.factor)
    if family.name == "qwen" and scaling is None and read.boolean("use_dynamic_ntk"):
        scaling = RopeScaling("qwen_ntk", 1.0, max_position)  # max_position is seq_length so far
        if raw.get("max_position_embeddings") is not None:
            longest = read.number(raw, "max_position_embeddings", None)
            max_position = max(max_position, int(min(longest, LARGEST["max_position"])))
    window, window_layers = _window(read, layers)
    _refuse_other_maths(raw, family)
    experts = read.integer("num_experts") if "experts.{e}.gate" in family.linears else 0
    per_token = read.integer("experts_per_token") if experts else 0
    if per_token > experts:
        raise InputError(f"config.json: num_experts_per_tok {per_token} is more than the {experts} experts.")

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
        qk_norm=family.qk_norm,
        logn_attention=family.name == "qwen" and read.boolean("use_logn_attn"),
        num_experts=experts,
        experts_per_token=per_token,
        bos_token_id=bos,
        eos_token_ids=eos,
        dtype=_dtype(raw),
        quantization=parse_quantization(raw, true_bits),
    )
    return config, family, notes


def _kv_heads(read: ConfigReader, heads: int) -> int:
    key = read.key("num_kv_heads")
    if key in read.raw and read.raw[key] is None:
        return heads
    return read.integer("num_kv_heads", heads)


def _window(read: ConfigReader, layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    rule, raw = read.family.window, read.raw
    if rule == "none" or (rule == "layers" and not read.boolean("use_sliding_window")):
        return None, None
    window = raw["sliding_window"] if "sliding_window" in raw else read.family.defaults.get("sliding_window")
    if window is None:
        return None, None
    if isinstance(window, bool) or not isinstance(window, int) or not 0 < window <= 2**31:
        raise InputError(
            f"config.json: sliding_window is {show(repr(window))}, expected a whole number above 0."
        )
    if rule == "all":
        return window, None
    types = raw.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
            raise InputError(
                f"config.json: layer_types must list one of {known} for each of the {layers} layers."
            )
        return window, tuple(i for i, t in enumerate(types) if t == "sliding_attention")
    first = raw.get("max_window_layers", read.family.defaults.get("max_window_layers"))
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise InputError(f"config.json: max_window_layers is {show(repr(first))}, expected a whole number.")
    return window, tuple(range(first, layers))


def _refuse_other_maths(raw: Mapping[str, Any], family: Family) -> None:
    """Keys that would change what the family computes, with the only values that our forward pass has."""
    activation = raw.get("hidden_act")
    if activation is not None and activation not in ("silu", "swish"):
        raise InputError(
            f"config.json: hidden_act {show(repr(activation))}: a {family.name} model here has silu."
        )
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
                    f"config.json: {key} is {show(repr(value))}, expected a token id or a list of them."
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
    raise InputError(f"config.json: dtype {show(repr(name))}, expected float16, bfloat16 or float32.")


def updated_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A copy of config.json whose sizes are those of `config`, which padding may have changed."""
    family = family_named(config.family)
    document = dict(raw)
    sizes: dict[str, int | float] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size * (2 if family.intermediate_halved else 1),
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "norm_eps": config.norm_eps,
        "head_dim": config.head_dim,
    }
    for field, value in sizes.items():
        key = family.keys.get(field, FIELDS[field])
        implied = {"num_kv_heads": config.num_heads, "head_dim": config.hidden_size // config.num_heads}
        if key in document or implied.get(field) != value:
            document[key] = value
    return document
