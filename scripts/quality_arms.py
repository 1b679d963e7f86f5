"""Arms and models of `bench_quality.py`: how they are written on the command line, and the recipe that each makes.

An arm is PRESET[:name=value]..., a name being a field of QuantConfig, `group` (group_size), or a setting of a step: plan.NAME, learn.NAME,
distill.NAME, effort.NAME, `metric` (share of the identity), `ridges` (numbers joined by +). ARM/settings/settings adds end-to-end passes,
each from the blocks of ARM, with these settings. A model is PATH[:pad][:group=N][:calib=FILE], FILE `self` being text that the model writes.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_origin

from quant.config import QuantConfig
from quant.recipes import Recipe, with_settings
from quant.settings import Distillation, Effort, LearnedRounding, SolverSteps

CONFIG_TYPES = {field.name: field.type for field in fields(QuantConfig)}
ALIASES = {"metric": "learn.metric_identity", "ridges": "plan.ridges"}


@dataclass(frozen=True)
class Arm:
    """One way to quantize."""

    text: str
    quant: QuantConfig
    passes: tuple["Arm", ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """A model to run the arms on."""

    path: Path
    pad: bool
    group_size: int | None
    calib: Path | None

    @property
    def name(self) -> str:
        return self.path.name + (" padded" if self.pad else "")


def parse_model(text: str) -> ModelSpec:
    """PATH[:pad][:group=N][:calib=FILE]"""
    path, *options = text.split(":")
    values = dict(option.partition("=")[::2] for option in options)
    unknown = set(values) - {"pad", "group", "calib"}
    if unknown:
        raise ValueError(f"{text}: {', '.join(sorted(unknown))} is no option of a model: pad, group, calib.")
    return ModelSpec(
        Path(path),
        "pad" in values,
        int(values["group"]) if "group" in values else None,
        Path(values["calib"]) if "calib" in values else None,
    )


def parse_arm(text: str, base: QuantConfig) -> Arm:
    """An arm over the settings of `base`. Raises ValueError for a name that is none."""
    first, *others = text.split("/")
    preset, *options = first.split(":")
    values: dict[str, Any] = {"preset": preset}
    settings = {}
    for option in options:
        name, _, value = option.partition("=")
        name = {"group": "group_size"}.get(name, name)
        if name in CONFIG_TYPES:
            values[name] = _converted(value, CONFIG_TYPES[name])
        elif name.split(".")[0] in ("plan", "learn", "distill", "effort", "metric", "ridges"):
            settings[name] = value
        else:
            raise ValueError(f"{text}: {name} is no setting.")
    arm = Arm(first, replace(base, **values | {"preset": _recipe(preset, settings)}))
    passes = [parse_arm(f"{first}:distill=1{':' if other else ''}{other}", base) for other in others]
    return replace(arm, passes=(arm,) * arm.quant.distill + tuple(passes))


GROUPS = {"plan": "steps", "learn": "learning", "distill": "distillation", "effort": "effort"}
TYPES = {
    "steps": SolverSteps,
    "learning": LearnedRounding,
    "distillation": Distillation,
    "effort": Effort,
}


def _recipe(preset: str, settings: dict[str, str]) -> str | Recipe:
    """The preset, or one like it with these settings."""
    changed: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        step, _, entry = ALIASES.get(name, name).partition(".")
        group = GROUPS[step]
        types = {part.name: part.type for part in fields(TYPES[group])}
        if entry not in types:
            raise ValueError(f"{entry} is no field of {TYPES[group].__name__}: {', '.join(types)}.")
        changed.setdefault(group, {})[entry] = _converted(value, types[entry])
    return with_settings(preset, **changed) if changed else preset


def _converted(value: str, kind: Any) -> Any:
    if kind is bool:
        return value not in ("0", "false")
    if get_origin(kind) is tuple:
        return tuple(float(part) for part in value.split("+"))
    return kind(value) if kind in (int, float) else value
