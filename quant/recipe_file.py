"""Recipes from files: YAML that changes a registered one, or the record of a recipe in a manifest. Nothing in a file is run.

    base: default                    # the preset to start from
    name: my-recipe                  # left out: the name of the file
    steps: {toward_float: 0.5}       # of the solver; fields of `quant.settings.SolverSteps`
    learning: {steps: 200}           # of learned rounding (`LearnedRounding`); null: none
    distillation: {steps: 300}       # of --distill (`Distillation`)
    efforts: {cpu: {rounds: 2}}      # by device (`Effort`)
    skip:                            # globs over full module names: these stay float16
      - model.layers.0.mlp.down_proj
    layers:                          # other settings for some modules; later entries win
      - match: model.layers.[01].*
        steps: {rounds: 4}
        learning: null

What is left out is as in `base`. Every mistake is refused with its line.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from convert.errors import InputError, UsageError
from convert.folder.json_files import INDEX_LIMIT, read_bytes, read_object
from quant.recipes import LayerRule, ModulePattern, Overrides, Recipe, names, recipe_named
from quant.settings import LearnedRounding, SolverSteps

T = TypeVar("T")

YAML_LIMIT = 1 << 16  # bytes of a recipe
ENDINGS = (".yaml", ".yml", ".json")
KEYS = (
    "name",
    "label",
    "summary",
    "base",
    "revision",
    "steps",
    "learning",
    "distillation",
    "efforts",
    "skip",
    "layers",
)
STAR = "A pattern that begins with * stands in quotes."
_TAG = "tag:yaml.org,2002:"
_KINDS = {"str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false"}


def is_recipe_file(text: str) -> bool:
    """Whether this is the name of a recipe file and not of a preset."""
    return text not in names() and text.endswith(ENDINGS)


def find_recipe(preset: str | Recipe) -> str | Recipe:
    """What a caller named: the recipe of a file, or the name of a preset (or a recipe) as it stands."""
    return load_recipe(preset) if isinstance(preset, str) and is_recipe_file(preset) else preset


def load_recipe(path: str | Path) -> Recipe:
    """The recipe of a YAML file, or of a manifest that `quantize awq` wrote (its "recipe").

    Raises InputError naming file and line: for what is no YAML, an unknown key or setting, a value of another type or out of
    range, an unknown base, a name that a preset has, and for anchors and aliases.
    """
    path = Path(path)
    if path.suffix == ".json":
        return _recorded(path)
    try:
        text = read_bytes(path, YAML_LIMIT).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8: expected a recipe in YAML.") from error
    document = _Document(str(path), has_lines=True)
    root = document.compose(text)
    recipe = _recipe(document, root, default_name=path.stem)
    if recipe.name in names():
        raise document.error(
            root, f"the recipe has the name of the preset {recipe.name}: give it another one (name: ...)."
        )
    return recipe


def _recorded(path: Path) -> Recipe:
    """The recipe on record in a manifest."""
    found = read_object(path, INDEX_LIMIT)
    record = found.get("recipe", found if "base" in found else None)
    if not isinstance(record, dict):
        raise InputError(f"{path} holds no recipe: expected tmq/manifest.json of what `quantize awq` wrote.")
    document = _Document(str(path), has_lines=False)
    root = document.compose(json.dumps(record, ensure_ascii=False))
    recipe = _recipe(document, root, default_name=path.stem)
    # as it stands on record, it may be the preset itself: then it is that row, with its label and place in tables
    known = recipe_named(recipe.name) if recipe.name in names() else None
    return known if known is not None and known.to_json() == recipe.to_json() else recipe


class _Document:
    """The nodes of one file, and errors that say where."""

    def __init__(self, file: str, *, has_lines: bool) -> None:
        self.file, self._has_lines = file, has_lines

    def place(self, node: yaml.Node) -> str:
        return f"{self.file}, line {node.start_mark.line + 1}" if self._has_lines else self.file

    def error(self, node: yaml.Node, text: str) -> InputError:
        return InputError(f"{self.place(node)}: {text}")

    def compose(self, text: str) -> yaml.Node:
        """The root of a document without anchors, aliases and tags of its own."""
        try:
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
                    line = "" if event.start_mark is None else f", line {event.start_mark.line + 1}"
                    raise InputError(
                        f"{self.file}{line}: anchors (&) and aliases (*) are not read: write the value out. {STAR}"
                    )
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = "" if mark is None else f", line {mark.line + 1}"
            hint = f" {STAR}" if "alias" in (error.context or "") else ""
            raise InputError(f"{self.file}{line}: this is no YAML: {error.problem}.{hint}") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"{self.file} is no YAML that can be read: {str(error)[:200]}.") from error
        if root is None:
            raise InputError(f"{self.file} is empty: expected a recipe, at least `base: default`.")
        return root

    def mapping(self, node: yaml.Node, what: str, known: tuple[str, ...]) -> dict[str, yaml.Node]:
        """Key -> value, each key known and given once."""
        if not isinstance(node, yaml.MappingNode) or node.tag != _TAG + "map":
            raise self.error(
                node, f"{what} is {_shown(node)}: expected keys and values ({', '.join(known)})."
            )
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = str(key.value)
            if not isinstance(key, yaml.ScalarNode) or name not in known:
                raise self.error(key, f"{what} has no {_shown(key)}: expected some of {', '.join(known)}.")
            if name in found:
                raise self.error(key, f"{what} has {name} twice.")
            found[name] = value
        return found

    def sequence(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        """The entries of a list."""
        if not isinstance(node, yaml.SequenceNode) or node.tag != _TAG + "seq":
            raise self.error(node, f"{what} is {_shown(node)}: expected a list (lines that begin with -).")
        return list(node.value)

    def value(self, node: yaml.Node, what: str, kind: Any) -> Any:
        """A value of this type: str, int, float, bool, a Literal, or a tuple of floats."""
        if get_origin(kind) is tuple:
            part = get_args(kind)[0]
            return tuple(self.value(entry, what, part) for entry in self.sequence(node, what))
        if get_origin(kind) is Literal:
            choices = get_args(kind)
            if _scalar(node, str) not in choices:
                raise self.error(node, f"{what} is {_shown(node)}: expected one of {', '.join(choices)}.")
            return _scalar(node, str)
        found = _scalar(node, kind)
        if found is None:
            raise self.error(node, f"{what} is {_shown(node)}: expected {_KINDS[kind.__name__]}.")
        return found

    def settings(self, node: yaml.Node, what: str, kind: type) -> dict[str, Any]:
        """Some fields of a dataclass of settings, each of the field's type."""
        types = get_type_hints(kind)
        known = tuple(part.name for part in fields(kind))
        found = self.mapping(node, what, known)
        return {name: self.value(value, f"{what}.{name}", types[name]) for name, value in found.items()}

    def changed(self, node: yaml.Node, what: str, before: T) -> T:
        """Settings with some fields changed; values out of range are refused."""
        values = self.settings(node, what, type(before))
        return self.guarded(node, lambda: replace(before, **values))  # type: ignore[type-var]

    def guarded(self, node: yaml.Node, make: Callable[[], T]) -> T:
        """What `make` gives; its ValueError or UsageError becomes an error with a place."""
        try:
            return make()
        except (ValueError, UsageError) as error:
            raise self.error(node, str(error)) from error


def _scalar(node: yaml.Node, kind: type) -> Any:
    """The value of a node that is of this type, or None."""
    if not isinstance(node, yaml.ScalarNode) or not node.tag.startswith(_TAG):
        return None
    tag = node.tag.removeprefix(_TAG)
    if kind is str:
        return node.value if tag == "str" else None
    if kind is bool:
        return (
            node.value.lower() == "true"
            if node.value.lower() in ("true", "false") and tag == "bool"
            else None
        )
    if node.style is not None:  # quoted: a text
        return None
    try:
        number = kind(node.value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value[:60])
    return "a list" if isinstance(node, yaml.SequenceNode) else "a group of keys"


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "null"


def _recipe(document: _Document, root: yaml.Node, default_name: str) -> Recipe:
    parts = document.mapping(root, "a recipe", KEYS)
    if "base" not in parts:
        raise document.error(root, f"the recipe has no base: expected one of {', '.join(names())}.")
    base_name = document.value(parts["base"], "base", str)
    base = document.guarded(parts["base"], lambda: recipe_named(base_name))
    texts = {
        key: document.value(parts[key], key, str) for key in ("name", "label", "summary") if key in parts
    }
    name = texts.get("name", default_name)
    changed: dict[str, Any] = {"name": name, "label": name, "base": base.root} | texts
    if "revision" in parts:
        revision = document.value(parts["revision"], "revision", int)
        if revision != base.revision:
            raise document.error(
                parts["revision"],
                f"the recipe was made for revision {revision} of {base.name}, which has revision {base.revision} now: its "
                "mathematics has changed. Leave the line out to run it all the same.",
            )
    changed |= _settings(document, parts, base)
    if "skip" in parts:
        entries = document.sequence(parts["skip"], "skip")
        changed["skip"] = tuple(_pattern(document, entry, "an entry of skip") for entry in entries)
    if "layers" in parts:
        ready = document.guarded(root, lambda: replace(base, **{**changed, "skip": ()}))
        entries = document.sequence(parts["layers"], "layers")
        changed["layers"] = tuple(_rule(document, entry, ready) for entry in entries)
    return document.guarded(root, lambda: replace(base, **changed))


def _settings(document: _Document, parts: Mapping[str, yaml.Node], base: Recipe) -> dict[str, Any]:
    """What the file changes in the settings of its base."""
    changed: dict[str, Any] = {}
    for key in ("steps", "learning", "efforts"):
        if key in parts and base.steps is None and not _is_null(parts[key]):
            raise document.error(
                parts[key], f"{base.name} takes no {key}: it has no solver steps that could be set."
            )
    if "steps" in parts and base.steps is not None:
        changed["steps"] = document.changed(parts["steps"], "steps", base.steps)
    if "learning" in parts:
        node = parts["learning"]
        before = base.learning or LearnedRounding()
        changed["learning"] = None if _is_null(node) else document.changed(node, "learning", before)
    if "distillation" in parts:
        node = parts["distillation"]
        changed["distillation"] = document.changed(node, "distillation", base.distillation)
    if "efforts" in parts and base.steps is not None:
        devices = document.mapping(parts["efforts"], "efforts", ("cpu", "gpu"))
        efforts = {
            device: document.changed(node, f"efforts.{device}", getattr(base.efforts, device))
            for device, node in devices.items()
        }
        changed["efforts"] = replace(base.efforts, **efforts)
    return changed


def _pattern(document: _Document, node: yaml.Node, what: str) -> ModulePattern:
    glob = document.value(node, what, str)
    if not glob:
        raise document.error(node, f"{what} is empty: expected the name of a module, or a pattern.")
    return ModulePattern(glob, document.place(node))


def _rule(document: _Document, node: yaml.Node, recipe: Recipe) -> LayerRule:
    """One entry of `layers`, its values tried on the recipe."""
    parts = document.mapping(node, "an entry of layers", ("match", "steps", "learning"))
    if "match" not in parts or len(parts) == 1:
        raise document.error(
            node, "an entry of layers needs match (a pattern) and at least one of steps and learning."
        )
    steps: Overrides = ()
    learning: Overrides = ()
    learns = True
    for key in ("steps", "learning"):
        if key in parts and getattr(recipe, key) is None:
            raise document.error(
                parts[key], f"the recipe has no {key}, so that none can be changed by layer."
            )
    if "steps" in parts:
        document.changed(parts["steps"], "steps", recipe.steps)
        steps = tuple(document.settings(parts["steps"], "steps", SolverSteps).items())
    if "learning" in parts:
        learns = not _is_null(parts["learning"])
        if learns:
            document.changed(parts["learning"], "learning", recipe.learning)
            learning = tuple(document.settings(parts["learning"], "learning", LearnedRounding).items())
    return LayerRule(_pattern(document, parts["match"], "match"), steps, learning, learns)
