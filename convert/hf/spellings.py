"""One value under every key by which a reader of config.json looks for it.

dtype: `dtype` (transformers 5) and `torch_dtype` (before). RoPE: `rope_theta` with `rope_scaling` (transformers 4, LMDeploy up
to 0.12.1), and `rope_parameters` (transformers 5). The two never disagree, so any order of looking gives the same model.
"""

from collections.abc import Mapping
from typing import Any

from convert.config import ModelConfig
from convert.families.table import BY_NAME


def both_spellings(raw: Mapping[str, Any], config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A copy of config.json that states `dtype` and the RoPE of `config` in both ways.

    RoPE keys stay as they are where the family has a spelling of its own, or the layers have several.
    """
    document = dict(raw) | {"dtype": dtype, "torch_dtype": dtype}
    older, newer = raw.get("rope_scaling"), raw.get("rope_parameters")
    stated = {**(older or {}), **(newer or {})}
    has_own_spelling = "rope_theta" in BY_NAME[config.family].keys or "rotary" in raw
    if has_own_spelling or any(isinstance(value, dict) for value in stated.values()):
        return document
    kind = stated.get("rope_type", stated.get("type")) or "default"
    rest = {key: value for key, value in stated.items() if key not in ("type", "rope_type", "rope_theta")}
    document["rope_theta"] = config.rope_theta
    document["rope_parameters"] = {"rope_type": kind, "rope_theta": config.rope_theta, **rest}
    if older is None:
        document["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rest}
    return document
