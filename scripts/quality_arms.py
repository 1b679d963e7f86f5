"""Arms and models of `bench_quality.py`: how they are written on the command line, and settings that hold for one arm alone.

An arm is PRESET[:name=value]..., a name being a field of QuantConfig, `group` (group_size), or a setting of a step: plan.NAME, learn.NAME,
distill.NAME, effort.NAME, `metric` (share of the identity), `ridges` (numbers joined by +). ARM/settings/settings adds end-to-end passes,
each from the blocks of ARM, with these settings. A model is PATH[:pad][:group=N][:calib=FILE], FILE `self` being text that the model writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from quant import recipes as presets
from quant.config import QuantConfig
from quant.learn import distill, rounding, sensitivity
from quant.search import block_search
from quant.search.rounding import targets

CONFIG_TYPES = {field.name: field.type for field in fields(QuantConfig)}


@dataclass(frozen=True)
class Arm:
    """One way to quantize. `settings`: name -> value of what is no field of QuantConfig."""

    text: str
    quant: QuantConfig
    settings: dict[str, str]
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
    arm = Arm(first, replace(base, **values), settings)
    passes = [parse_arm(f"{first}:distill=1{':' if other else ''}{other}", base) for other in others]
    return replace(arm, passes=(arm,) * arm.quant.distill + tuple(passes))


@contextmanager
def in_force(arm: Arm) -> Iterator[None]:
    """The settings of an arm, while it runs."""
    saved = (
        dict(presets.PLANS),
        rounding.LEARNING,
        distill.DISTILLING,
        sensitivity.PLAIN,
        targets.RIDGES,
        block_search.effort_on,
    )
    try:
        for name, value in arm.settings.items():
            _set(arm.quant.preset, name, value)
        yield
    finally:
        presets.PLANS.update(saved[0])
        rounding.LEARNING, distill.DISTILLING, sensitivity.PLAIN = saved[1], saved[2], saved[3]
        targets.RIDGES, block_search.effort_on = saved[4], saved[5]


def _set(preset: Any, name: str, value: str) -> None:
    step, _, field = name.partition(".")
    if step == "plan":
        presets.PLANS[preset] = _changed(presets.PLANS[preset], field, value)
    elif step == "learn":
        rounding.LEARNING = _changed(rounding.LEARNING, field, value)
    elif step == "distill":
        distill.DISTILLING = _changed(distill.DISTILLING, field, value)
    elif step == "effort":
        usual = block_search.effort_on
        block_search.effort_on = lambda device: _changed(usual(device), field, value)
    elif step == "metric":
        sensitivity.PLAIN = float(value)
    else:
        targets.RIDGES = tuple(float(part) for part in value.split("+"))


def _changed(settings: Any, field: str, value: str) -> Any:
    types = {entry.name: entry.type for entry in fields(settings)}
    if field not in types:
        raise ValueError(f"{field} is no field of {type(settings).__name__}: {', '.join(types)}.")
    return replace(settings, **{field: _converted(value, types[field])})


def _converted(value: str, kind: Any) -> Any:
    if kind is bool:
        return value not in ("0", "false")
    return kind(value) if kind in (int, float) else value
