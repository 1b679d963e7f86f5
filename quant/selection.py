"""Which linears become integers, and with which settings: the patterns of a recipe applied to the modules of one model.

A linear is known by (index of its block, role). Names of modules are those of the checkpoint, as
`model.layers.0.self_attn.q_proj`. K in features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from convert.config import ModelConfig
from convert.errors import InputError
from convert.families.table import BY_NAME, linear_modules, linear_shapes
from quant.config import QuantConfig
from quant.recipes import ModulePattern, Overrides, Recipe

ROUTER = "router"
SHOWN = 4  # names in a message

Linear = tuple[int, str]


@dataclass(frozen=True)
class Selection:
    """What the patterns of a recipe come to on one model."""

    skipped: frozenset[Linear] = frozenset()
    steps: Mapping[Linear, Overrides] = field(default_factory=dict)
    learning: Mapping[int, Overrides | None] = field(default_factory=dict)  # by block; None: not learned


def selection(recipe: Recipe, config: ModelConfig) -> Selection:
    """The patterns of `recipe` on this model.

    Raises InputError, with the place of the pattern, for one that matches nothing, and for one that takes a part of what
    engines fuse (q, k and v; gate and up; all experts of a block) or of what is solved or learned together.
    """
    return _selection(recipe, config) if recipe.skip or recipe.layers else _NOTHING


def is_quantized(config: ModelConfig, quant: QuantConfig, index: int, role: str) -> bool:
    """Whether this linear becomes integers: no router, K a multiple of the group, not skipped by the recipe."""
    if role == ROUTER or linear_shapes(config)[role][1] % quant.group_size:
        return False
    return not is_skipped(config, quant, index, role)


def is_skipped(config: ModelConfig, quant: QuantConfig, index: int, role: str) -> bool:
    """Whether the recipe leaves this linear in float by name."""
    return (index, role) in selection(quant.recipe, config).skipped


def ragged_roles(config: ModelConfig, quant: QuantConfig) -> list[str]:
    """Roles whose K is no multiple of the group, in at least one block where the recipe does not skip them."""
    return [
        role
        for role, (_, cols) in linear_shapes(config).items()
        if role != ROUTER
        and cols % quant.group_size
        and not all(is_skipped(config, quant, index, role) for index in range(config.num_layers))
    ]


def skipped_modules(config: ModelConfig, quant: QuantConfig) -> list[str]:
    """Full names of the modules that the recipe leaves in float, block by block."""
    skipped = selection(quant.recipe, config).skipped
    if not skipped:
        return []
    names = module_names(config)
    return list(dict.fromkeys(name for linear, name in names.items() if linear in skipped))


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
    """The full name of every linear of the blocks; q, k and v of a fused family share one."""
    family = BY_NAME[config.family]
    modules = linear_modules(family, config)
    names = {}
    for index in range(config.num_layers):
        prefix = family.block.format(i=index)
        for role in linear_shapes(config):
            names[index, role] = prefix + (modules.get(role) or str(family.fused))
    return names


_NOTHING = Selection()


@lru_cache(maxsize=64)
def _selection(recipe: Recipe, config: ModelConfig) -> Selection:
    names = module_names(config)
    skipped: dict[Linear, ModulePattern] = {}
    for pattern in recipe.skip:
        skipped |= dict.fromkeys(_matched(pattern, names, recipe, config, may_name_float=True), pattern)
    _refuse_parts(skipped, _fused(config), names, recipe, "engines fuse it with {rest}: skip all or none")
    steps: dict[Linear, dict[str, Any]] = {}
    learning: dict[int, dict[str, Any] | None] = {}
    for rule in recipe.layers:
        found = dict.fromkeys(_matched(rule.match, names, recipe, config), rule.match)
        if rule.steps:
            reason = "it is solved together with {rest}: give all of them the same steps"
            _refuse_parts(found, _stacks(config), names, recipe, reason)
            for linear in found:
                steps.setdefault(linear, {}).update(rule.steps)
        if rule.learning or not rule.learns:
            block = [{role for role in linear_shapes(config) if role != ROUTER}]
            reason = "rounding is learned block by block: match {rest} too"
            _refuse_parts(found, block, names, recipe, reason)
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
    found = [linear for linear in named if linear[1] != ROUTER]
    family = BY_NAME[config.family]
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
    groups: Iterable[set[str]],
    names: Mapping[Linear, str],
    recipe: Recipe,
    reason: str,
) -> None:
    """InputError where some linears of a group of one block are found and others are not."""
    for index in sorted({index for index, _ in found}):
        for group in groups:
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


def _fused(config: ModelConfig) -> list[set[str]]:
    """Roles that engines hold in one matrix."""
    if not config.num_experts:
        return [{"q", "k", "v"}, {"gate", "up"}]
    experts = {role for role in linear_shapes(config) if role.startswith("experts.")}
    return [{"q", "k", "v"}, experts]


def _stacks(config: ModelConfig) -> list[set[str]]:
    """Roles that are solved together; experts share the scale of their norm."""
    if not config.num_experts:
        return [{"q", "k", "v"}, {"gate", "up"}]
    readers = {role for role in linear_shapes(config) if role.endswith((".gate", ".up"))}
    return [{"q", "k", "v"}, readers]
