"""Which linears become integers, and with which settings: the patterns of a recipe applied to the modules of one model.

A linear is known by (index of its block, role). Names of modules are those of the checkpoint, as
`model.layers.0.self_attn.q_proj`. K in features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any

from convert.config import ModelConfig
from convert.errors import InputError
from convert.families.table import linear_modules, linear_shapes, names_of, stays_float
from quant.config import QuantConfig
from quant.recipes import ModulePattern, Overrides, Recipe

SHOWN = 4  # names in a message

Linear = tuple[int, str]


@dataclass(frozen=True)
class Selection:
    """What the patterns of a recipe come to on one model."""

    skipped: frozenset[Linear] = frozenset()
    steps: Mapping[Linear, Overrides] = field(default_factory=dict)
    learning: Mapping[int, Overrides | None] = field(default_factory=dict)  # by block; None: not learned


@dataclass(frozen=True)
class FloatLinears:
    """Linears that stay float: roles, or full names of modules, as `QuantFormat` lists them; and a sentence about each kind."""

    names: tuple[str, ...]
    notes: tuple[str, ...]


def selection(recipe: Recipe, config: ModelConfig) -> Selection:
    """The patterns of `recipe` on this model.

    Raises InputError, with the place of the pattern, for one that matches nothing, and for one that takes a part of what
    engines fuse (q, k and v; gate and up; all experts of a block) or of what is solved or learned together.
    """
    return _selection(recipe, config) if recipe.skip or recipe.layers else _NOTHING


def is_quantized(config: ModelConfig, quant: QuantConfig, index: int, role: str) -> bool:
    """Whether this linear becomes integers: no router, K a multiple of the group, not skipped by the recipe."""
    if stays_float(role) or linear_shapes(config.of_layer(index))[role][1] % quant.group_size:
        return False
    return not is_skipped(config, quant, index, role)


def is_skipped(config: ModelConfig, quant: QuantConfig, index: int, role: str) -> bool:
    """Whether the recipe leaves this linear in float by name."""
    return (index, role) in selection(quant.recipe, config).skipped


def ragged_roles(config: ModelConfig, quant: QuantConfig) -> list[str]:
    """Roles whose K is no multiple of the group, in at least one block where the recipe does not skip them."""
    found = {
        role: None
        for index in range(config.num_layers)
        for role, (_, cols) in linear_shapes(config.of_layer(index)).items()
        if not stays_float(role) and cols % quant.group_size and not is_skipped(config, quant, index, role)
    }
    return list(found)


def skipped_modules(config: ModelConfig, quant: QuantConfig) -> list[str]:
    """Full names of the modules that the recipe leaves in float, block by block."""
    skipped = selection(quant.recipe, config).skipped
    if not skipped:
        return []
    names = module_names(config)
    return list(dict.fromkeys(name for linear, name in names.items() if linear in skipped))


def float_linears(config: ModelConfig, quant: QuantConfig) -> FloatLinears:
    """The linears of the blocks that stay float16: those that the group size does not fit, and those that the recipe skips."""
    ragged, skipped = ragged_roles(config, quant), skipped_modules(config, quant)
    notes = [
        f"{role} stays float16 in every layer: K is no multiple of {quant.group_size}." for role in ragged
    ]
    if skipped:
        notes.append(f"{len(skipped)} modules stay float16, as the recipe asks: {', '.join(skipped)}.")
    return FloatLinears((*ragged, *skipped), tuple(notes))


def config_of_stack(
    quant: QuantConfig, config: ModelConfig, index: int, roles: tuple[str, ...]
) -> QuantConfig:
    """The configuration of linears that are solved together: `quant` itself where no rule of the recipe changes it."""
    changed = selection(quant.recipe, config).steps.get((index, roles[0]))
    recipe = quant.recipe
    if not changed or recipe.steps is None:
        return quant
    return replace(quant, preset=replace(recipe, steps=replace(recipe.steps, **dict(changed))))


def config_of_block(quant: QuantConfig, config: ModelConfig, index: int) -> QuantConfig:
    """The configuration of one block, with its own settings of learned rounding."""
    recipe, table = quant.recipe, selection(quant.recipe, config).learning
    if index not in table or recipe.learning is None:
        return quant
    changed = table[index]
    if changed is None:
        rules = tuple(replace(rule, learning=()) for rule in recipe.layers)
        return replace(quant, preset=replace(recipe, learning=None, layers=rules))
    return replace(quant, preset=replace(recipe, learning=replace(recipe.learning, **dict(changed))))


def module_names(config: ModelConfig) -> dict[Linear, str]:
    """The full name of every linear of the blocks; those of a fused tensor share one."""
    family = names_of(config)
    fused = {role: tensor.module for tensor in family.fused for role in tensor.roles}
    names = {}
    for index in range(config.num_layers):
        prefix, layer = family.block.format(i=index), config.of_layer(index)
        modules = linear_modules(family, layer)
        for role in linear_shapes(layer):
            names[index, role] = prefix + (modules.get(role) or fused[role])
    return names


_NOTHING = Selection()


@lru_cache(maxsize=64)
def _selection(recipe: Recipe, config: ModelConfig) -> Selection:
    names = module_names(config)
    skipped: dict[Linear, ModulePattern] = {}
    for pattern in recipe.skip:
        skipped |= dict.fromkeys(_matched(pattern, names, recipe, config, may_name_float=True), pattern)
    _refuse_parts(
        skipped, partial(_fused, config), names, recipe, "engines fuse it with {rest}: skip all or none"
    )
    steps: dict[Linear, dict[str, Any]] = {}
    learning: dict[int, dict[str, Any] | None] = {}
    for rule in recipe.layers:
        found = dict.fromkeys(_matched(rule.match, names, recipe, config), rule.match)
        if rule.steps:
            reason = "it is solved together with {rest}: give all of them the same steps"
            _refuse_parts(found, partial(_stacks, config), names, recipe, reason)
            for linear in found:
                steps.setdefault(linear, {}).update(rule.steps)
        if rule.learning or not rule.learns:
            reason = "rounding is learned block by block: match {rest} too"
            _refuse_parts(found, partial(_searched, config), names, recipe, reason)
            for index in {index for index, _ in found}:
                before = learning.get(index) or {}
                learning[index] = before | dict(rule.learning) if rule.learns else None
    return Selection(
        frozenset(skipped),
        {linear: tuple(values.items()) for linear, values in steps.items()},
        {index: None if values is None else tuple(values.items()) for index, values in learning.items()},
    )


def _matched(
    pattern: ModulePattern,
    names: Mapping[Linear, str],
    recipe: Recipe,
    config: ModelConfig,
    *,
    may_name_float: bool = False,
) -> list[Linear]:
    """The linears that the pattern names, routers left out; InputError where it names none."""
    named = [linear for linear, name in names.items() if fnmatchcase(name, pattern.glob)]
    found = [linear for linear in named if not stays_float(linear[1])]
    family = names_of(config)
    outside = (family.lm_head, family.embedding)
    is_float = bool(named) or any(fnmatchcase(name, pattern.glob) for name in outside)
    if not found and not (may_name_float and is_float):
        example = next(iter(names.values()))
        raise InputError(
            f"{_place(pattern, recipe)}: {pattern.glob!r} names no linear of this model's {config.num_layers} blocks. "
            f"Names are those of the checkpoint, as {example!r}."
        )
    return found


def _refuse_parts(
    found: Mapping[Linear, ModulePattern],
    groups_of: Callable[[int], list[set[str]]],
    names: Mapping[Linear, str],
    recipe: Recipe,
    reason: str,
) -> None:
    """InputError where some linears of a group of one block are found and others are not."""
    for index in sorted({index for index, _ in found}):
        for group in groups_of(index):
            inside = [(index, role) for role in sorted(group) if (index, role) in found]
            rest = sorted({names[index, role] for role in group if (index, role) not in found})
            if inside and rest:
                pattern = found[inside[0]]
                listed = ", ".join(rest[:SHOWN]) + (", ..." if len(rest) > SHOWN else "")
                raise InputError(
                    f"{_place(pattern, recipe)}: {pattern.glob!r} takes {names[inside[0]]} alone, but "
                    f"{reason.format(rest=listed)}."
                )


def _place(pattern: ModulePattern, recipe: Recipe) -> str:
    return pattern.where or f"the recipe {recipe.name}"


def _searched(config: ModelConfig, index: int) -> list[set[str]]:
    """All roles of a block but those that are never quantized."""
    return [{role for role in linear_shapes(config.of_layer(index)) if not stays_float(role)}]


def _fused(config: ModelConfig, index: int) -> list[set[str]]:
    """Roles that engines hold in one matrix."""
    config = config.of_layer(index)
    if not config.num_experts:
        return [{"q", "k", "v"}, {"gate", "up"}]
    experts = {role for role in linear_shapes(config) if role.startswith("experts.")}
    shared = [{"shared.gate", "shared.up"}] if config.shared_intermediate_size else []
    return [{"q", "k", "v"}, experts, *shared]


def _stacks(config: ModelConfig, index: int) -> list[set[str]]:
    """Roles that are solved together; experts share the scale of their norm."""
    config = config.of_layer(index)
    if not config.num_experts:
        return [{"q", "k", "v"}, {"gate", "up"}]
    readers = {role for role in linear_shapes(config) if role.endswith((".gate", ".up"))}
    return [{"q", "k", "v"}, readers]
