"""The presets: one row each. Help, tables, plans, fingerprints and the dispatch of a block read the row and know no name.

A row names the function that quantizes a block as "module:function", so that help does not import torch. A Python program
adds a row with `register`; `quant.recipe_file` reads one from YAML.
"""

import difflib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from convert.errors import UsageError
from quant.settings import Distillation, Effort, Efforts, LearnedRounding, SolverSteps

BlockFunction = Callable[
    [Any], Any
]  # BlockTask -> BlockResult of quant.block_task, which stands above this module
Overrides = tuple[tuple[str, Any], ...]  # (name of a setting, value)


@dataclass(frozen=True)
class ModulePattern:
    """A glob over full module names, as `model.layers.0.mlp.*`; `where` says in messages where it was written."""

    glob: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class LayerRule:
    """Other settings for the linears that a pattern matches. Of several rules that match, the later ones win.

    `steps` go with whole stacks (linears that share an input), `learning` with whole blocks; `learns` False leaves learned
    rounding out there.
    """

    match: ModulePattern
    steps: Overrides = ()
    learning: Overrides = ()
    learns: bool = True


@dataclass(frozen=True)
class Recipe:
    """One way to quantize a model, as data.

    Args:
        name: what `--preset` takes. label: what tables show. summary: one line of the help.
        search: quantizes a block (`BlockTask` -> `BlockResult`): a callable, or "module:function".
        text: "none" reads no text; "statistics" also takes saved statistics in its place; "text" needs the text itself.
        float_stream: `search` looks at the float model's hidden states, whatever the steps say.
        steps: of the solver; None where `search` takes none, and then no learned rounding follows either.
        learning: learned rounding of each block; None: none. distillation: of an end-to-end pass (`--distill`).
        efforts: sizes of the searches by device. in_table: `evaluate table` has it among its default rows.
        revision: goes up when the mathematics of `search` changes, so that an unfinished run of before is refused.
        base: the registered recipe that this one changes; empty: itself.
        skip: modules that stay float. layers: other settings by module.
    """

    name: str
    label: str
    summary: str
    search: BlockFunction | str
    text: Literal["none", "statistics", "text"] = "text"
    float_stream: bool = False
    steps: SolverSteps | None = None
    learning: LearnedRounding | None = None
    distillation: Distillation = field(default_factory=Distillation)
    efforts: Efforts = field(default_factory=Efforts)
    in_table: bool = True
    revision: int = 1
    base: str = ""
    skip: tuple[ModulePattern, ...] = ()
    layers: tuple[LayerRule, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or any(c in self.name for c in " ,+:/\\"):
            raise UsageError(
                f"A recipe is named {self.name!r}: expected a name without blanks, commas, colons, slashes and plus signs."
            )
        if self.steps is None and (self.learning is not None or any(r.steps for r in self.layers)):
            raise UsageError(
                f"The recipe {self.name} takes no solver steps: learned rounding and steps by layer need them."
            )
        if self.learning is None and any(rule.learning for rule in self.layers):
            raise UsageError(f"The recipe {self.name} learns no rounding: its layers have no settings of it.")

    @property
    def reads_float_stream(self) -> bool:
        """Whether the float model's hidden states are needed next to those of the quantized one."""
        changed = any(dict(rule.steps).get("toward_float", 0) > 0 for rule in self.layers)
        ahead = self.steps is not None and self.steps.toward_float > 0
        return self.float_stream or ahead or changed or self.learning is not None

    @property
    def root(self) -> str:
        """The registered recipe whose search function it has."""
        return self.base or self.name

    def function(self) -> BlockFunction:
        """The function that quantizes a block."""
        if not isinstance(self.search, str):
            return self.search
        found: BlockFunction = pkgutil.resolve_name(self.search)
        return found

    def effort_on(self, device_type: str) -> Effort:
        """The sizes of its searches on a device of this type ("cpu", "cuda")."""
        return self.efforts.on(device_type)

    def to_json(self) -> dict[str, Any]:
        """The whole recipe as `quant.recipe_file` reads it: every setting, resolved."""
        document: dict[str, Any] = {"name": self.name, "base": self.root, "revision": self.revision}
        if self.steps is not None:
            document["steps"] = asdict(self.steps) | {"ridges": list(self.steps.ridges)}
            document["learning"] = None if self.learning is None else asdict(self.learning)
            document["efforts"] = asdict(self.efforts)
        document["distillation"] = asdict(self.distillation)
        document["skip"] = [pattern.glob for pattern in self.skip]
        document["layers"] = [_rule_json(rule) for rule in self.layers]
        return document

    def fingerprint(self, with_distillation: bool) -> dict[str, Any]:
        """What makes two runs the same run: every setting by a name of its own. Distillation counts where it is asked for."""
        document = self.to_json()
        name = document.pop("name")
        if not with_distillation:
            del document["distillation"]
        return {"preset": name} | dict(_flat("recipe", document))


def _rule_json(rule: LayerRule) -> dict[str, Any]:
    document: dict[str, Any] = {"match": rule.match.glob}
    if rule.steps:
        document["steps"] = {
            name: list(value) if isinstance(value, tuple) else value for name, value in rule.steps
        }
    if not rule.learns:
        document["learning"] = None
    elif rule.learning:
        document["learning"] = dict(rule.learning)
    return document


def _flat(prefix: str, document: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Nested objects as (dotted name, value)."""
    found: list[tuple[str, Any]] = []
    for name, value in document.items():
        if isinstance(value, dict):
            found += _flat(f"{prefix} {name}" if prefix == "recipe" else f"{prefix}.{name}", value)
        else:
            found.append((f"{prefix} {name}" if prefix == "recipe" else f"{prefix}.{name}", value))
    return found


_SOLVER = "quant.blocks:solve_block"
_FULL = SolverSteps(scale=True, toward_float=1.0, compensate="static", rounds=2)
FLOAT = "fp16"  # the name of the model that is not quantized
DISTILLED = "+distill"  # after the name of a recipe: with an end-to-end pass
_ROWS: dict[str, Recipe] = {}


def register(recipe: Recipe) -> Recipe:
    """Add a recipe, so that `--preset`, help, tables and plans know it. Raises UsageError where its name is taken."""
    if recipe.name in _ROWS:
        raise UsageError(
            f"A recipe named {recipe.name} is registered already: give the new one another name."
        )
    if recipe.base and recipe.base not in _ROWS:
        raise UsageError(f"The recipe {recipe.name} changes {recipe.base}, which is not registered.")
    _ROWS[recipe.name] = recipe
    return recipe


def unregister(name: str) -> None:
    """Take away a recipe that a program had registered."""
    _ROWS.pop(name, None)


def names() -> tuple[str, ...]:
    """The names of all recipes, from quick to thorough, then those that programs have registered."""
    return tuple(_ROWS)


def rows() -> tuple[Recipe, ...]:
    """All recipes, in the order of `names`."""
    return tuple(_ROWS.values())


def names_on_statistics() -> tuple[str, ...]:
    """The recipes that also search on saved statistics, in place of text."""
    return tuple(row.name for row in rows() if row.text == "statistics")


def methods() -> tuple[str, ...]:
    """What rows of a table may be called: the float model, every recipe, those that read text with an end-to-end pass too."""
    return (FLOAT, *_ROWS, *(row.name + DISTILLED for row in rows() if row.text != "none"))


def usual_methods() -> tuple[str, ...]:
    """The rows of a table where nobody chooses."""
    return (FLOAT, *(row.name for row in rows() if row.in_table))


def label_of(method: str) -> str:
    """What a table calls a method."""
    if method == FLOAT:
        return "float"
    return _ROWS[method].label if method in _ROWS else method


def recipe_named(name: str) -> Recipe:
    """The recipe with this name. Raises UsageError naming the nearest one."""
    if name in _ROWS:
        return _ROWS[name]
    near = difflib.get_close_matches(name, _ROWS, n=1)
    hint = f" The nearest one is {near[0]}." if near else ""
    raise UsageError(f"The preset is {name!r}: expected one of {', '.join(_ROWS)}.{hint}")


def with_settings(
    recipe: Recipe | str,
    *,
    steps: Mapping[str, Any] | None = None,
    learning: Mapping[str, Any] | None = None,
    distillation: Mapping[str, Any] | None = None,
    effort: Mapping[str, Any] | None = None,
) -> Recipe:
    """The same recipe with some settings changed; `effort` on every kind of device.

    Raises ValueError for a value out of range, TypeError for a setting that does not exist, UsageError for settings of a step
    that the recipe does not take.
    """
    found = recipe_named(recipe) if isinstance(recipe, str) else recipe
    changed: dict[str, Any] = {"base": found.root}
    for name, values in (("steps", steps), ("learning", learning)):
        if values:
            if (now := getattr(found, name)) is None:
                raise UsageError(f"The recipe {found.name} has no {name}: it takes no setting of them.")
            changed[name] = replace(now, **values)
    if distillation:
        changed["distillation"] = replace(found.distillation, **distillation)
    if effort:
        changed["efforts"] = Efforts(
            cpu=replace(found.efforts.cpu, **effort), gpu=replace(found.efforts.gpu, **effort)
        )
    return replace(found, **changed)


register(
    Recipe("rtn", "RTN", "round to nearest, no text needed", "quant.search.rtn:round_block", text="none")
)
register(
    Recipe(
        "gptq",
        "GPTQ",
        "error compensation, as published",
        _SOLVER,
        steps=SolverSteps(compensate="published"),
    )
)
register(
    Recipe(
        "gptq-r",
        "GPTQ-R",
        "gptq with act-order and static groups",
        _SOLVER,
        steps=SolverSteps(compensate="static"),
    )
)
register(
    Recipe(
        "awq",
        "AWQ",
        "channel scales, then clip ranges, judged block by block",
        "quant.search.awq_published:quantize_published",
        float_stream=True,
        revision=2,  # judged on the quantized stream; before, on the float one
    )
)
register(
    Recipe(
        "fast",
        "fast",
        "scales and clip ranges chosen together from Gram matrices",
        _SOLVER,
        text="statistics",
        steps=SolverSteps(scale=True, refit=True),
    )
)
register(
    Recipe(
        "default",
        "default",
        "fast, then error compensation on the quantized model's own inputs",
        _SOLVER,
        steps=_FULL,
    )
)
register(
    Recipe(
        "best",
        "best",
        "default, then learned rounding on the output of each block",
        _SOLVER,
        steps=_FULL,
        learning=LearnedRounding(),
        in_table=False,  # minutes where the others take seconds
    )
)
