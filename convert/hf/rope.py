"""RoPE in a config.json: `rope_theta` + `rope_scaling`, or `rope_parameters` of transformers 5, as theta and `RopeScaling`."""

import math
from collections.abc import Mapping
from typing import Any

from convert.config import RopeKind, RopeScaling
from convert.errors import InputError
from convert.folder.json_files import show
from convert.hf.config_reader import ConfigReader


def parse_rope(read: ConfigReader, max_position: int) -> tuple[float, RopeScaling | None]:
    raw = read.raw
    params: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters", "rotary"):  # `rotary`: InternLM's own spelling
        value = raw.get(key)
        if value is None or (key == "rotary" and read.family.name != "internlm"):
            continue
        if not isinstance(value, dict):
            raise InputError(f"config.json: {key} is {show(repr(value))}, expected an object or null.")
        params |= value
    theta_key = read.key("rope_theta")
    theta = params.get("rope_theta", params.get("base", raw.get(theta_key)))
    theta = read.number({theta_key: theta}, theta_key, float(read.family.defaults.get("rope_theta", 10000.0)))
    partial = params.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial is None and read.family.name == "qwen":
        partial = raw.get("rotary_pct")
    if partial not in (None, 1, 1.0):
        raise InputError(
            f"config.json: partial_rotary_factor {show(repr(partial))}: only whole heads are rotated here."
        )
    kind = params.get("rope_type", params.get("type", "default"))
    if kind in (None, "default", "origin"):
        return theta, None
    if kind not in ("linear", "dynamic", "yarn", "llama3"):
        raise InputError(
            f"config.json: RoPE scaling {show(repr(kind))} is not supported; expected default, linear, dynamic, yarn or llama3."
        )
    if params.get("truncate", True) is not True:
        raise InputError("config.json: yarn with truncate false is not supported.")
    factor = read.number(params, "factor", 1.0 if "base" in params else None, "RoPE scaling factor")
    original = params.get("original_max_position_embeddings", raw.get("original_max_position_embeddings"))
    if original is None or kind in ("linear", "dynamic"):
        original = max_position
    if isinstance(original, bool) or not isinstance(original, int) or not 0 < original <= 2**31:
        raise InputError(
            f"config.json: original_max_position_embeddings is {show(repr(original))}, expected a length."
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
