"""The quality benchmark: arms and their settings, rows for several models and texts, written as they are measured."""

import json
import sys
from pathlib import Path

import pytest

from quant.config import QuantConfig
from quant.recipes import recipe_named
from quant.settings import Distillation
from scripts import bench_quality
from tests.tiny_runs import write_runnable

quality_arms = sys.modules["quality_arms"]


def test_an_arm_is_a_recipe_with_the_settings_that_it_names() -> None:
    arm = quality_arms.parse_arm(
        "best:bits=3:group=32:plan.toward_float=0.5:learn.average=0.25:distill.swap=0:effort.rounds=1:ridges=0.1+1",
        QuantConfig(seed=2),
    )
    assert (arm.quant.recipe.name, arm.quant.bits, arm.quant.group_size, arm.quant.seed) == ("best", 3, 32, 2)
    recipe = arm.quant.recipe
    assert recipe.steps is not None and recipe.learning is not None
    assert recipe.steps.toward_float == 0.5 and recipe.learning.average == 0.25
    assert recipe.distillation.swap == 0.0 and recipe.steps.ridges == (0.1, 1.0)
    assert recipe.effort_on("cpu").rounds == recipe.effort_on("cuda").rounds == 1
    assert recipe != recipe_named("best") and recipe.base == "best"
    with pytest.raises(ValueError, match="speed is no setting"):
        quality_arms.parse_arm("fast:speed=1", QuantConfig())


def test_passes_follow_an_arm_with_its_settings_and_their_own() -> None:
    arm = quality_arms.parse_arm("best:bits=3/distill.steps=7/", QuantConfig())
    steps = [one.quant.recipe.distillation.steps for one in arm.passes]
    assert not arm.quant.distill and steps == [7, Distillation().steps]
    assert all(one.quant.bits == 3 and one.quant.distill for one in arm.passes)
    assert quality_arms.parse_arm("best:distill=1", QuantConfig()).passes[0].text == "best:distill=1"


def test_a_model_may_be_padded_and_have_its_own_text() -> None:
    spec = quality_arms.parse_model("a/b:pad:group=128:calib=c.txt")
    assert spec.pad and spec.group_size == 128 and spec.calib == Path("c.txt") and spec.name == "b padded"


def test_rows_of_several_models_texts_and_caches(tmp_path: Path) -> None:
    first, second = write_runnable(tmp_path / "one"), write_runnable(tmp_path / "two", seed=9)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"row {i} of a text\n\n" for i in range(700)))
    out = tmp_path / "rows.json"
    options = "--group-size 32 --samples 8 --seqlen 32 --windows 2 --kl-windows 1 --window 128 --device cpu"
    arms = (
        "rtn,fast:bits=3,best:learn.steps=2:learn.average=0.5/distill.steps=2/distill.steps=3:distill.swap=0"
    )
    texts = f"--calib {text} --test {text} --test {text}:rows --kv 8:static,4 --kv-presets best"
    run = f"{first} {second}:pad {texts} --arms {arms} {options} --out {out}"
    bench_quality.main(run.split())
    rows = json.loads(out.read_text())["rows"]
    assert {row["model"] for row in rows} == {"one", "two padded"}
    assert {row["text"] for row in rows} == {"text.txt", "text.txt rows"}
    for model in ("one", "two padded"):
        found = [row for row in rows if row["model"] == model and row["text"] == "text.txt"]
        names = [(row["method"], row["kv_bits"], row["kv_mode"]) for row in found]
        assert names[:2] == [("fp", 16, ""), ("fp", 4, "dynamic")]
        assert (
            names.count(("best+distill", 16, "")) == 2
            and ("best+distill", 8, "static") in names
            and ("best", 4, "dynamic") in names
        )
        assert all(row["kl"] is not None and row["ppl_diff_ci95"] is not None for row in found[1:])
        assert all(row["kl_windows"] == 1 and row["windows"] == 2 for row in found[1:])
