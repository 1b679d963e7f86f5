"""The experts of a config.json: how many, how large, how they are chosen, and which layers have none."""

from typing import Any

from convert.config import Router
from convert.errors import InputError
from convert.families.family import Mixture
from convert.folder.json_files import show_value
from convert.hf.config_reader import ConfigReader


def parse_mixture(read: ConfigReader, layers: int) -> dict[str, Any]:
    """Fields of `ModelConfig` by name; empty for a family without experts. Raises InputError naming the key."""
    mixture = read.family.mixture
    if mixture is None:
        return {}
    key = next((name for name in mixture.experts if read.raw.get(name) is not None), mixture.experts[0])
    experts = read.integer("num_experts", key=key)
    per_token = read.integer("experts_per_token")
    if per_token > experts:
        raise InputError(f"config.json: num_experts_per_tok {per_token} is more than the {experts} experts.")
    size = 0 if mixture.size is None else read.integer("intermediate_size", key=mixture.size)
    return {
        "num_experts": experts,
        "experts_per_token": per_token,
        "expert_intermediate_size": size,
        "shared_intermediate_size": _shared_size(read, mixture, size),
        "shared_gated": mixture.shared_gated,
        "router": _router(read, mixture, experts, per_token),
        "dense_layers": _dense_layers(read, mixture, layers),
    }


def _whole(read: ConfigReader, key: str, fallback: int, most: int) -> int:
    """A whole number from 0."""
    value = read.raw.get(key)
    value = read.family.defaults.get(key, fallback) if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise InputError(f"config.json: {key} is {show_value(value)}, expected a whole number up to {most}.")
    return value


def _shared_size(read: ConfigReader, mixture: Mixture, size: int) -> int:
    if mixture.shared_size is not None:
        return read.integer("intermediate_size", key=mixture.shared_size)
    if mixture.shared_count is not None:
        return size * _whole(read, mixture.shared_count, 0, 1024)
    return 0


def _router(read: ConfigReader, mixture: Mixture, experts: int, per_token: int) -> Router:
    renormalize = mixture.renormalize
    renormalize = read.boolean(renormalize) if isinstance(renormalize, str) else renormalize
    if not mixture.grouped:
        return Router(mixture.scores, renormalize, corrected=mixture.corrected)
    groups, top = (max(1, _whole(read, key, 1, experts)) for key in ("n_group", "topk_group"))
    if experts % groups or top > groups or per_token > top * (experts // groups):
        raise InputError(
            f"config.json: {experts} experts in n_group {groups}, of which topk_group {top} are eligible for {per_token} experts "
            "a token: expected equal groups with enough experts."
        )
    if groups > 1 and experts // groups < 2:
        raise InputError(
            f"config.json: n_group {groups} leaves fewer than two of {experts} experts in a group."
        )
    scale = read.number(read.raw, "routed_scaling_factor", 1.0)
    return Router(mixture.scores, renormalize, groups, top, scale, mixture.corrected)


def _dense_layers(read: ConfigReader, mixture: Mixture, layers: int) -> tuple[int, ...]:
    if mixture.dense_first is not None:
        return tuple(range(min(layers, _whole(read, mixture.dense_first, 0, 4096))))
    if not mixture.dense_by_step:
        return ()
    step = max(1, _whole(read, "decoder_sparse_step", 1, 4096))
    named = read.raw.get("mlp_only_layers") or []
    if not isinstance(named, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in named):
        raise InputError(f"config.json: mlp_only_layers is {show_value(named)}, expected a list of layers.")
    return tuple(i for i in range(layers) if i in named or (i + 1) % step)
