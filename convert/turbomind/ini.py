"""Dialect 0.1: config.ini and the static KV int8 files of LMDeploy 0.0.14 to 0.3.0. Knows nothing of weight files.

Format: LMDeploy 0.1.0, lmdeploy/turbomind/deploy/target_model/base.py; lmdeploy/lite/apis/kv_qparams.py.
"""

import configparser
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from convert import kv_parameters
from convert.config import ModelConfig, RopeScaling
from convert.errors import InputError
from convert.families.table import BY_NAME
from convert.folder.boundary import reading
from convert.folder.json_files import show, show_value
from convert.hf.config_reader import LARGEST
from convert.hf.safetensors_files import read_header, read_tensor
from convert.turbomind.config import KEYS, Shape, check_shape, counted_positions

WEIGHT_TYPES = {"float16": "fp16", "bfloat16": "bf16", "int4": "int4"}
STATIC_KV_INT8 = 4  # quant_policy of releases up to 0.3.0; from 0.4.0 on the same number means int4


def config_ini(config: ModelConfig, shape: Shape, chat_template: str, kv_int8: bool = False) -> str:
    """The text of config.ini, section [llama]. `kv_int8`: the static parameters lie beside it."""
    scaling = config.rope_scaling
    keys = {
        "model_name": chat_template,
        "tensor_para_size": shape.tp,
        "head_num": config.num_heads,
        "kv_head_num": shape.num_kv_heads,
        "vocab_size": config.vocab_size,
        "num_layer": config.num_layers,
        "inter_size": shape.intermediate_size,
        "norm_eps": config.norm_eps,
        "attn_bias": int(shape.attn_bias),
        "start_id": config.bos_token_id or 0,
        "end_id": config.eos_token_ids[0] if config.eos_token_ids else 0,
        "session_len": config.max_position + 8,
        "weight_type": WEIGHT_TYPES[shape.weight_type],
        "rotary_embedding": config.head_dim,
        "rope_theta": float(config.rope_theta),
        "size_per_head": config.head_dim,
        "group_size": shape.group_size,
        "max_batch_size": 64,
        "max_context_token_num": 1,
        "step_length": 1,
        "cache_max_entry_count": 0.5,
        "cache_block_seq_len": 128,
        "cache_chunk_size": 1,
        "use_context_fmha": 1,
        "quant_policy": STATIC_KV_INT8 if kv_int8 else 0,
        "max_position_embeddings": counted_positions(config),
        "rope_scaling_factor": float(scaling.factor) if scaling else 0.0,
        "use_logn_attn": int(config.logn_attention),
    }
    return "[llama]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items()) + "\n"


@reading("config.ini")
def parse_config_ini(text: str, where: str) -> tuple[ModelConfig, Shape]:
    """The model and the packing that a config.ini states. The family is not in the file: Llama is assumed here.

    Raises InputError for a missing key, a wrong type, a key or section that stands twice.
    """
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise InputError(f"{where} is damaged ({show(str(error))}): convert the model again.") from error
    if not parser.has_section("llama"):
        raise InputError(f"{where} has no section [llama]: this is not a config.ini of TurboMind.")
    section = _Section(dict(parser["llama"]), where)
    kinds = {name: kind for kind, name in WEIGHT_TYPES.items()}
    weight_type = section.text("weight_type")
    if weight_type not in kinds:
        raise InputError(f"{where}: weight_type is {show(weight_type)}, expected one of {', '.join(kinds)}.")
    heads, head_dim = section.number("head_num"), section.number("size_per_head")
    shape = Shape(
        tp=section.number("tensor_para_size"),
        group_size=section.number("group_size"),
        weight_type=kinds[weight_type],
        intermediate_size=section.number("inter_size"),
        num_kv_heads=section.number("kv_head_num") or heads,
        attn_bias=bool(section.number("attn_bias")),
        kv_int8=section.number("quant_policy") == STATIC_KV_INT8,
    )
    check_shape(shape, where)
    max_position = section.number("max_position_embeddings")
    factor = section.real("rope_scaling_factor")
    config = ModelConfig(
        family="llama",
        architecture=BY_NAME["llama"].architecture,
        hidden_size=heads * head_dim,
        intermediate_size=shape.intermediate_size,
        num_layers=section.number("num_layer"),
        num_heads=heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=head_dim,
        vocab_size=section.number("vocab_size"),
        norm_eps=section.real("norm_eps"),
        rope_theta=section.real("rope_theta"),
        max_position=max_position,
        rope_scaling=RopeScaling("dynamic", factor, max_position) if factor else None,
        qkv_bias=shape.attn_bias,
        o_bias=shape.attn_bias,
        logn_attention=bool(section.number("use_logn_attn")),
        bos_token_id=section.number("start_id"),
        eos_token_ids=(section.number("end_id"),),
        dtype="bfloat16" if shape.weight_type == "bfloat16" else "float16",
    )
    return config, shape


class _Section:
    """Typed access; every failure names the file and the key."""

    def __init__(self, raw: dict[str, str], where: str) -> None:
        self.raw, self.where = raw, where

    def text(self, key: str) -> str:
        if key not in self.raw:
            raise InputError(f"{self.where}: the key {key!r} is missing. Convert the model again.")
        return self.raw[key]

    def number(self, key: str) -> int:
        try:
            value = int(self.text(key))
        except ValueError as error:
            raise InputError(
                f"{self.where}: {key} is {show(self.text(key))}, expected a whole number."
            ) from error
        largest = LARGEST.get(KEYS.get(key, ""), 2**31 - 1)
        if not 0 <= value <= largest:
            raise InputError(
                f"{self.where}: {key} is {show_value(value)}, expected a number from 0 to {largest:,}."
            )
        return value

    def real(self, key: str) -> float:
        try:
            value = float(self.text(key))
        except ValueError as error:
            raise InputError(f"{self.where}: {key} is {show(self.text(key))}, expected a number.") from error
        if not 0 <= value < float("inf"):
            raise InputError(f"{self.where}: {key} is {value}, expected a finite number of at least 0.")
        return value


def kv_scale_files(parameters: Path, config: ModelConfig, tp: int) -> Iterator[tuple[str, Tensor]]:
    """(name, 4 float32 [k_scale, k_zp, v_scale, v_zp]) for each layer and rank, from per-head parameters.

    The heads of a rank share one range: its minimum and maximum over them; scale = (max - min) / 255 and
    zp = (max + min) / 2, so that u8 = round((x - zp) / scale + 128). A head's range follows from its own scale and zero:
    [zero - 128 scale, zero + 127 scale]. Raises InputError where a layer is missing, has another count or is not finite.
    """
    tensors = {name: read_tensor(info) for name, info in read_header(parameters).items()}
    for layer in range(config.num_layers):
        ranges = {}
        for which in ("k", "v"):
            scale, zero = (
                _head_values(tensors, f"layers.{layer}.{which}.{part}", config) for part in ("scale", "zero")
            )
            ranges[which] = (zero - 128 * scale).chunk(tp), (zero + 127 * scale).chunk(tp)
        for rank in range(tp):
            values = []
            for which in ("k", "v"):
                low, high = ranges[which][0][rank].min(), ranges[which][1][rank].max()
                values += [(high - low) / 255, (high + low) / 2]
            yield f"layers.{layer}.past_kv_scale.{rank}.weight", torch.stack(values).float()


def check_kv_values(values: Tensor, name: str) -> None:
    """Raises InputError where the four floats of a past_kv_scale file cannot be a range."""
    if not bool(torch.isfinite(values).all()) or not bool((values[[0, 2]] > 0).all()):
        raise InputError(
            f"{name}: {values.tolist()} are no scale and zero point of K and V. Calibrate and pack again."
        )


def _head_values(tensors: dict[str, Tensor], name: str, config: ModelConfig) -> Tensor:
    values = tensors.get(name)
    if values is None or tuple(values.shape) != (config.num_kv_heads,):
        found = "absent" if values is None else f"of shape {tuple(values.shape)}"
        raise InputError(
            f"{kv_parameters.FILE}: {name} is {found}, expected {config.num_kv_heads} values. Calibrate again."
        )
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{kv_parameters.FILE}: {name} holds NaN or infinity. Calibrate again.")
    return values
