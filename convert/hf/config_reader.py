"""Typed, bounded access to one config.json: every value is checked where it is read. Knows the keys, not their meaning."""

import math
from collections.abc import Mapping
from typing import Any

from convert.errors import InputError
from convert.families.family import Family
from convert.folder.json_files import show, show_value

FIELDS = {  # our field -> key of config.json; a family's `keys` override
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_position": "max_position_embeddings",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
}
LARGEST = {  # far above any model there is, far below what would fill a memory before the error shows
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_layers": 2**12,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**12,
    "vocab_size": 2**24,
    "max_position": 2**31,
    "num_experts": 2**10,
    "experts_per_token": 2**10,
}


class ConfigReader:
    """Typed access to one config.json."""

    def __init__(self, raw: Mapping[str, Any], family: Family) -> None:
        self.raw, self.family = raw, family

    def key(self, field: str) -> str:
        return self.family.keys.get(field, FIELDS.get(field, field))

    def integer(self, field: str, fallback: int | None = None, key: str | None = None) -> int:
        """The whole number of a field, from 1 to its limit; `key` in place of the family's own."""
        key = self.key(field) if key is None else key
        value = self.raw.get(key)
        if value is None:
            value = self.family.defaults.get(key, self.family.defaults.get(field, fallback))
        if value is None:
            raise InputError(
                f"config.json: the key {key} is missing; a {self.family.name} model needs it. Copy config.json again."
            )
        largest = LARGEST[field]
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"config.json: {key} is {show_value(value)}, expected a whole number above 0.")
        if not 0 < value <= largest:
            raise InputError(
                f"config.json: {key} is {show(str(value))}, expected a number from 1 to {largest:,}."
            )
        return value

    def number(self, where: Mapping[str, Any], key: str, fallback: float | None, name: str = "") -> float:
        value = where.get(key)
        if value is None:
            value = fallback
        name = name or key
        if value is None:
            raise InputError(f"config.json: {name} is missing; this kind of RoPE scaling needs it.")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"config.json: {name} is {show_value(value)}, expected a number.")
        if not (abs(value) <= 1e30 and math.isfinite(value) and value > 0):
            raise InputError(f"config.json: {name} is {show(str(value))}, expected a finite number above 0.")
        return float(value)

    def optional_number(self, key: str | None) -> float | None:
        """A number above 0 that may be null or absent; None too where the family has no such key."""
        if key is None:
            return None
        value = self.raw[key] if key in self.raw else self.family.defaults.get(key)
        return None if value is None else self.number({key: value}, key, None)

    def boolean(self, key: str, fallback: bool = False) -> bool:
        value = self.raw.get(key)
        if value is None:
            value = self.family.defaults.get(key, fallback)
        if not isinstance(value, bool):
            raise InputError(f"config.json: {key} is {show_value(value)}, expected true or false.")
        return value

    def flag(self, rule: bool | str) -> bool:
        return self.boolean(rule) if isinstance(rule, str) else rule
