"""RoPE in a config.json: `rope_theta` + `rope_scaling`, or `rope_parameters` of transformers 5, as theta and `RopeScaling`."""

import math
from collections.abc import Mapping
from typing import Any

from convert.config import RopeKind, RopeScaling
from convert.errors import InputError
from convert.folder.json_files import show_value
from convert.hf.config_reader import ConfigReader


def parse_rope(read: ConfigReader, max_position: int) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling of the model; of a model whose layers differ, those of the layers without a window.

    Raises InputError naming the key, for kinds that the engine does not have too.
    """
    raw = read.raw
    params: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters", "rotary"):  # `rotary`: InternLM's own spelling
        value = raw.get(key)
        if value is None or (key == "rotary" and read.family.name != "internlm"):
            continue
        if not isinstance(value, dict):
            raise InputError(f"config.json: {key} is {show_value(value)}, expected an object or null.")
        params |= value.get("full_attention") or {} if read.family.local_rope and _is_nested(value) else value
    theta_key = read.key("rope_theta")
    theta = params.get("rope_theta", params.get("base", raw.get(theta_key)))
    theta = read.number({theta_key: theta}, theta_key, float(read.family.defaults.get("rope_theta", 10000.0)))
    kind = params.get("rope_type", params.get("type", "default"))
    if kind in (None, "default", "origin", "mrope"):  # mrope: sections of positions, which are equal for text
        return theta, None
    if read.family.name == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # as older releases of Phi-3 call it
    if kind not in ("linear", "dynamic", "yarn", "llama3", "longrope"):
        raise InputError(
            f"config.json: RoPE scaling {show_value(kind)} is not supported; expected default, linear, dynamic, yarn, llama3 or "
            "longrope."
        )
    if kind == "longrope":
        return theta, _longrope(read, params, max_position)
    if params.get("truncate", True) is not True:
        raise InputError("config.json: yarn with truncate false is not supported.")
    factor = read.number(params, "factor", 1.0 if "base" in params else None, "RoPE scaling factor")
    original = params.get("original_max_position_embeddings", raw.get("original_max_position_embeddings"))
    if original is None or kind in ("linear", "dynamic"):
        original = max_position
    if isinstance(original, bool) or not isinstance(original, int) or not 0 < original <= 2**31:
        raise InputError(
            f"config.json: original_max_position_embeddings is {show_value(original)}, expected a length."
        )
    typed: RopeKind = kind
    scaling = RopeScaling(kind=typed, factor=factor, original_max_position=original)
    if typed == "llama3":
        low = read.number(params, "low_freq_factor", 1.0)
        high = read.number(params, "high_freq_factor", 4.0)
        if high <= low:
            raise InputError(f"config.json: high_freq_factor {high} must be above low_freq_factor {low}.")
        return theta, RopeScaling(typed, factor, original, low, high)
    if typed == "yarn":
        return theta, RopeScaling(
            typed,
            factor,
            original,
            attention_factor=_yarn_attention(read, params, factor),
            beta_fast=read.number(params, "beta_fast", 32.0),
            beta_slow=read.number(params, "beta_slow", 1.0),
        )
    return theta, scaling


def parse_rotary_dim(read: ConfigReader, head_dim: int) -> int | None:
    """Channels of a head that RoPE turns, None where it turns all. Raises InputError for a share that gives no even number."""
    params = [read.raw.get(key) for key in ("rope_parameters", "rope_scaling")]
    found = [
        part["partial_rotary_factor"]
        for part in params
        if isinstance(part, dict) and "partial_rotary_factor" in part
    ]
    share = found[0] if found else read.raw.get("partial_rotary_factor")
    if share is None and read.family.name == "qwen":
        share = read.raw.get("rotary_pct")
    if share is None:
        share = read.family.defaults.get("partial_rotary_factor", 1.0)
    share = read.number({"partial_rotary_factor": share}, "partial_rotary_factor", None)
    rotated = int(head_dim * share)
    if share > 1 or rotated % 2 or rotated == 0:
        raise InputError(
            f"config.json: partial_rotary_factor {share} of heads of {head_dim} rotates {rotated} channels, expected an even "
            f"number from 2 to {head_dim}."
        )
    return None if rotated == head_dim else rotated


def parse_local_theta(read: ConfigReader) -> float | None:
    """RoPE base of the layers with a window, where they have their own."""
    if not read.family.local_rope:
        return None
    nested = read.raw.get("rope_parameters")
    part = nested.get("sliding_attention") if isinstance(nested, dict) and _is_nested(nested) else None
    part = part if isinstance(part, dict) else {}
    if part.get("rope_type", "default") != "default":
        raise InputError(
            "config.json: RoPE scaling of the layers with a window is not supported; expected default."
        )
    fallback = read.raw.get("rope_local_base_freq", read.family.defaults.get("rope_local_base_freq"))
    return read.number(part, "rope_theta", fallback, "rope_local_base_freq")


def _is_nested(params: Mapping[str, Any]) -> bool:
    """Whether rope_parameters hold an entry for each kind of layer."""
    return any(key in params for key in ("full_attention", "sliding_attention"))


def _longrope(read: ConfigReader, params: Mapping[str, Any], max_position: int) -> RopeScaling:
    """Phi-3's scaling: a divisor for each frequency, one list within the original context and one beyond it."""
    original = read.raw.get(
        "original_max_position_embeddings", params.get("original_max_position_embeddings")
    )
    if original is None:
        original = read.family.defaults.get("original_max_position_embeddings", max_position)
    if isinstance(original, bool) or not isinstance(original, int) or not 0 < original <= 2**31:
        raise InputError(
            f"config.json: original_max_position_embeddings is {show_value(original)}, expected a length."
        )
    factors: dict[str, tuple[float, ...]] = {}
    for key in ("short_factor", "long_factor"):
        value = params.get(key)
        if not isinstance(value, list) or not value or len(value) > 4096:
            raise InputError(f"config.json: longrope needs {key}, a list with a number for each RoPE pair.")
        factors[key] = tuple(read.number({key: item}, key, None) for item in value)
    factor = read.number(params, "factor", max_position / original)
    attention = read.number(
        params,
        "attention_factor",
        1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original)),
    )
    return RopeScaling(
        "longrope",
        factor,
        original,
        attention_factor=attention,
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
    )


def _yarn_attention(read: ConfigReader, params: Mapping[str, Any], factor: float) -> float | None:
    """Stated outright, or from mscale and mscale_all_dim as transformers does, or None: 0.1 ln(factor) + 1."""
    if params.get("attention_factor") is not None:
        return read.number(params, "attention_factor", None)
    if not params.get("mscale") or not params.get("mscale_all_dim"):
        return None

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    top, bottom = (read.number(params, key, None) for key in ("mscale", "mscale_all_dim"))
    return mscale(top) / mscale(bottom)
