"""TurboMind's configuration files: config.yaml of dialect 0.6.5 and its way back to a `ModelConfig`.

The engine reads most keys without a default, so every key is written. Knows nothing of tensors.
Format: LMDeploy 0.6.5, lmdeploy/turbomind/deploy/config.py and src/turbomind/triton_backend/llama/LlamaTritonModel.cc.
"""

from dataclasses import dataclass, replace
from typing import Any

import yaml

from convert.config import ModelConfig, RopeScaling
from convert.errors import InputError
from convert.families.rows import FAMILIES
from convert.folder.boundary import reading
from convert.folder.json_files import show, show_value
from convert.hf.config_reader import LARGEST

# The chat formats built into LMDeploy 0.6.5; it refuses to load a workspace that names another one.
CHAT_TEMPLATES = (
    *("base", "llama", "llama2", "llama3", "llama3_1", "llama3_2", "codellama", "vicuna", "wizardlm", "puyu"),
    *("internlm", "internlm2", "qwen", "qwen2d5", "mistral", "mixtral", "baichuan2", "solar", "yi", "falcon"),
    *(
        "gemma",
        "deepseek",
        "deepseek-coder",
        "chatglm",
        "chatglm3",
        "glm4",
        "codegeex4",
        "dbrx",
        "ultracm",
        "ultralm",
    ),
    *("phi-3", "minicpm3"),
)
# One of them, found by a marker that the checkpoint's own template must contain.
CHAT_MARKERS = (
    ("<|start_header_id|>", "llama3"),
    ("<<SYS>>", "llama2"),
    ("<|im_start|>", "qwen"),
    ("[INST]", "mistral"),
)
KEYS = {  # key of config.yaml or config.ini -> our field, whose bound holds for it
    "head_num": "num_heads",
    "kv_head_num": "num_kv_heads",
    "hidden_units": "hidden_size",
    "vocab_size": "vocab_size",
    "num_layer": "num_layers",
    "inter_size": "intermediate_size",
    "expert_inter_size": "intermediate_size",
    "size_per_head": "head_dim",
    "rotary_embedding": "head_dim",
    "expert_num": "num_experts",
    "experts_per_token": "experts_per_token",
    "tp": "num_heads",  # no more ranks than heads
    "tensor_para_size": "num_heads",
}
ROPE_KINDS = ("linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Shape:
    """What the packing decided beyond the model: ranks, padded sizes, replicated heads, the type of the weights."""

    tp: int
    group_size: int  # 0: float weights
    weight_type: str  # float16, bfloat16, int4
    intermediate_size: int
    num_kv_heads: int
    attn_bias: bool
    kv_int8: bool = False  # dialect 0.1: the static parameters of an int8 KV cache lie beside the weights


def check_shape(shape: Shape, where: str) -> Shape:
    """The shape, where its numbers can be meant. Raises InputError otherwise."""
    if shape.tp < 1:
        raise InputError(f"{where}: tp (tensor_para_size) is {shape.tp}, expected at least 1.")
    if shape.weight_type == "int4" and shape.group_size != 128:
        raise InputError(
            f"{where}: group_size is {shape.group_size}: TurboMind's int4 weights have groups of 128."
        )
    return shape


def chat_template_name(template: str | None, family: str) -> str:
    """The built-in chat format of LMDeploy that the checkpoint's template is written in; "base" where none is known."""
    if template and family in ("internlm", "internlm2"):
        return family
    for marker, name in CHAT_MARKERS:
        if template and marker in template:
            return name
    return "base"


def config_yaml(config: ModelConfig, shape: Shape, model_name: str, chat_template: str) -> str:
    """The text of config.yaml, every key of 0.6.5 in a fixed order."""
    experts = config.num_experts
    layers = config.num_layers
    model = {
        "model_name": model_name,
        "chat_template": chat_template,
        "model_arch": config.architecture,
        "head_num": config.num_heads,
        "kv_head_num": shape.num_kv_heads,
        "hidden_units": config.hidden_size,
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "num_layer": layers,
        "inter_size": [0 if experts else shape.intermediate_size] * layers,
        "norm_eps": config.norm_eps,
        "attn_bias": int(shape.attn_bias),
        "start_id": config.bos_token_id or 0,
        "end_id": config.eos_token_ids[0] if config.eos_token_ids else 0,
        "size_per_head": config.head_dim,
        "group_size": shape.group_size,
        "weight_type": shape.weight_type,
        "session_len": config.max_position,
        "tp": shape.tp,
        "model_format": "awq" if shape.weight_type == "int4" else "hf",
        "expert_num": [experts] * layers if experts else [],
        "expert_inter_size": shape.intermediate_size if experts else 0,
        "experts_per_token": config.experts_per_token,
        "moe_shared_gate": False,
        "norm_topk_prob": bool(experts),
        "routed_scale": 1.0,
        "topk_group": 1,
        "topk_method": "greedy",
        "moe_group_num": 1,
        "q_lora_rank": 0,
        "kv_lora_rank": 0,
        "qk_rope_dim": 0,
        "v_head_dim": 0,
        "tune_layer_num": 1,
    }
    lora = {
        "lora_policy": "",
        "lora_r": 0,
        "lora_scale": 0.0,
        "lora_max_wo_r": 0,
        "lora_rank_pattern": "",
        "lora_scale_pattern": "",
    }
    document = {"model_config": model, "attention_config": attention_config(config), "lora_config": lora}
    return yaml.safe_dump(document, sort_keys=False)


def attention_config(config: ModelConfig) -> dict[str, Any]:
    """The map `attention_config`: RoPE with its scaling, KV cache block."""
    scaling = config.rope_scaling
    kind = scaling.kind if scaling else ""
    is_qwen = kind == "qwen_ntk"  # TurboMind knows Qwen-1's rule by its switch alone
    attention_factor = scaling.attention_factor if scaling else None
    return {
        "rotary_embedding": config.head_dim,
        "rope_theta": float(config.rope_theta),
        "softmax_scale": 0.0,
        "attention_factor": -1.0 if attention_factor is None else float(attention_factor),
        "max_position_embeddings": counted_positions(config),
        "original_max_position_embeddings": scaling.original_max_position if scaling else 0,
        "rope_scaling_type": "" if is_qwen else kind,
        "rope_scaling_factor": float(scaling.factor) if scaling else 0.0,
        "use_dynamic_ntk": int(kind == "dynamic" or is_qwen),
        "low_freq_factor": scaling.low_freq_factor if scaling else 1.0,
        "high_freq_factor": scaling.high_freq_factor if scaling else 1.0,
        "beta_fast": scaling.beta_fast if scaling else 32.0,
        "beta_slow": scaling.beta_slow if scaling else 1.0,
        "use_logn_attn": int(config.logn_attention),
        "cache_block_seq_len": 64,
    }


def counted_positions(config: ModelConfig) -> int:
    """What TurboMind calls max_position_embeddings: yarn and Qwen-1's rule count from the training length, in tokens."""
    scaling = config.rope_scaling
    return (
        scaling.original_max_position
        if scaling and scaling.kind in ("yarn", "qwen_ntk")
        else config.max_position
    )


@reading("config.yaml")
def parse_config_yaml(text: str, where: str) -> tuple[ModelConfig, Shape]:
    """The model and the packing that a config.yaml states; `where` is named in errors.

    Sizes are those on disk: intermediate_size padded, KV heads replicated. What the file does not say (QK-norm, tied
    embeddings, the source's dtype) is left at its default. Raises InputError for a missing key or a wrong type.
    """
    try:
        document = yaml.load(text, _PlainLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not YAML ({show(str(error))}): convert the model again.") from error
    model, attention = _Map(document, "model_config", where), _Map(document, "attention_config", where)
    family = next((row for row in FAMILIES if row.architecture == model.text("model_arch")), None)
    if family is None:
        known = ", ".join(row.architecture for row in FAMILIES)
        raise InputError(
            f"{where}: model_arch is {show(model.text('model_arch'))!r}, expected one of {known}."
        )
    experts = model.items("expert_num")
    sizes = [model.number("expert_inter_size")] if experts else model.items("inter_size")
    if not sizes:
        raise InputError(f"{where}: inter_size is an empty list, expected a size for each layer.")
    inner = sizes[0]
    shape = Shape(
        tp=model.number("tp"),
        group_size=model.number("group_size"),
        weight_type=model.text("weight_type"),
        intermediate_size=inner,
        num_kv_heads=model.number("kv_head_num"),
        attn_bias=bool(model.number("attn_bias")),
    )
    check_shape(shape, where)
    if shape.weight_type not in ("float16", "bfloat16", "int4"):
        raise InputError(
            f"{where}: weight_type is {show(shape.weight_type)!r}, expected float16, bfloat16 or int4."
        )
    config = ModelConfig(
        family=family.name,
        architecture=family.architecture,
        hidden_size=model.number("hidden_units"),
        intermediate_size=inner,
        num_layers=model.number("num_layer"),
        num_heads=model.number("head_num"),
        num_kv_heads=shape.num_kv_heads,
        head_dim=model.number("size_per_head"),
        vocab_size=model.number("vocab_size"),
        norm_eps=model.real("norm_eps"),
        rope_theta=attention.real("rope_theta"),
        max_position=max(attention.number("max_position_embeddings"), model.number("session_len")),
        rope_scaling=_scaling(attention),
        qkv_bias=shape.attn_bias,
        o_bias=shape.attn_bias,
        logn_attention=bool(attention.number("use_logn_attn")),
        num_experts=experts[0] if experts else 0,
        experts_per_token=model.number("experts_per_token"),
        bos_token_id=model.number("start_id"),
        eos_token_ids=(model.number("end_id"),),
        dtype="bfloat16" if shape.weight_type == "bfloat16" else "float16",
    )
    return config, shape


def _scaling(attention: "_Map") -> RopeScaling | None:
    kind = attention.text("rope_scaling_type")
    if not kind and attention.number("use_dynamic_ntk"):
        return RopeScaling("qwen_ntk", 1.0, attention.number("max_position_embeddings"))
    if not kind:
        return None
    if kind not in ROPE_KINDS:
        raise InputError(
            f"{attention.where}: rope_scaling_type is {show(kind)!r}, expected one of {', '.join(ROPE_KINDS)}."
        )
    scaling = RopeScaling(
        kind=kind,  # type: ignore[arg-type]
        factor=attention.real("rope_scaling_factor"),
        original_max_position=attention.number("original_max_position_embeddings")
        or attention.number("max_position_embeddings"),  # LMDeploy fills the former for llama3 alone
        low_freq_factor=attention.real("low_freq_factor"),
        high_freq_factor=attention.real("high_freq_factor"),
        beta_fast=attention.real("beta_fast"),
        beta_slow=attention.real("beta_slow"),
    )
    factor = -1.0 if attention.raw.get("attention_factor") is None else attention.real("attention_factor")
    return scaling if factor < 0 else replace(scaling, attention_factor=factor)


class _PlainLoader(yaml.SafeLoader):
    """YAML without merge keys ("<<"), by which a few aliases stand for any number of entries."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("a merge key, which no file of TurboMind has")


class _Map:
    """Typed access to one map of the document; every failure names the file and the key."""

    def __init__(self, document: Any, name: str, where: str) -> None:
        raw = document.get(name) if isinstance(document, dict) else None
        if not isinstance(raw, dict):
            raise InputError(f"{where} has no map {name!r}: this is not a config.yaml of TurboMind 0.6.")
        self.raw, self.where = raw, f"{where}, {name}"

    def _get(self, key: str, kinds: tuple[type, ...], expected: str) -> Any:
        if key not in self.raw:
            raise InputError(f"{self.where}: the key {key!r} is missing. Convert the model again.")
        value = self.raw[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise InputError(f"{self.where}: {key} is {show_value(value)}, expected {expected}.")
        return value

    def text(self, key: str) -> str:
        return str(self._get(key, (str,), "a word"))

    def number(self, key: str) -> int:
        value = int(self._get(key, (int,), "a whole number"))
        if not 0 <= value <= LARGEST.get(KEYS.get(key, ""), 2**31 - 1):
            largest = LARGEST.get(KEYS.get(key, ""), 2**31 - 1)
            raise InputError(
                f"{self.where}: {key} is {show_value(value)}, expected a number from 0 to {largest:,}."
            )
        return value

    def real(self, key: str) -> float:
        value = self._get(key, (int, float), "a number (1.0e-05, with a dot, for YAML)")
        if not abs(value) <= 1e30:  # false for NaN as well
            raise InputError(f"{self.where}: {key} is {show_value(value)}, expected a finite number.")
        return float(value)

    def items(self, key: str) -> list[int]:
        values = self._get(key, (list, int), "a list of whole numbers")
        values = [values] if isinstance(values, int) else values
        if any(not isinstance(value, int) or isinstance(value, bool) or value < 0 for value in values):
            raise InputError(
                f"{self.where}: {key} is {show_value(values)}, expected a list of whole numbers."
            )
        if len(set(values)) > 1:
            raise InputError(
                f"{self.where}: {key} differs between layers ({show_value(sorted(set(values)))}): not supported."
            )
        largest = LARGEST[KEYS[key]]
        if values and values[0] > largest:
            raise InputError(
                f"{self.where}: {key} is {show_value(values[0])}, expected numbers from 0 to {largest:,}."
            )
        return values
