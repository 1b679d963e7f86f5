"""Recipes are rows: one that a program adds is in help, tables, plan and fingerprint, and quantizes a model."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_runs import FAST, files_of, run, write_runnable, write_text

from convert.errors import UsageError
from convert.folder.output import read_manifest
from convert.readers import open_checkpoint
from kernels.int4 import Quantized, quantize
from quant import recipes
from quant.block_states import QuantizedBlock
from quant.block_task import BlockResult, BlockTask, LinearReport
from quant.config import QuantConfig
from quant.estimate import plan_quantization
from quant.recipe_file import load_recipe
from quant.recipes import Recipe
from quant.selection import config_of_stack, is_quantized, skipped_modules
from quant.session import Session
from quant.state.fingerprint import run_fingerprint
from turbomind_quant.cli.quantize import quantize as quantize_command

CPU = torch.device("cpu")


def halve_and_round(task: BlockTask) -> BlockResult:
    """A search that nobody needs: every weight halved, then rounded to nearest."""
    linears, reports = dict(task.weights.linears), []
    for role, part in linears.items():
        if is_quantized(task.config, task.quant, task.weights.index, role):
            codes = quantize(part.weight.float() / 2, task.quant.bits, task.quant.group_size)
            linears[role] = replace(part, weight=codes)
            reports.append(LinearReport(role, codes.shape, 1.0, 1.0, 1.0))
    return BlockResult(QuantizedBlock.of(replace(task.weights, linears=linears)), tuple(reports), None)


TOY = Recipe("toy", "Toy", "halves every weight", halve_and_round, text="none", in_table=False)


@pytest.fixture
def toy() -> Iterator[Recipe]:
    yield recipes.register(TOY)
    recipes.unregister("toy")


@pytest.mark.usefixtures("toy")
def test_a_registered_recipe_is_in_help_table_plan_and_fingerprint_and_runs(tmp_path) -> None:
    model = write_runnable(tmp_path / "model", layers=2)
    shown = CliRunner().invoke(quantize_command, ["awq", "--help"]).output
    assert "toy      halves every weight" in shown and "|best|toy|FILE]" in shown
    assert "toy" in recipes.methods() and recipes.label_of("toy") == "Toy"
    assert "toy" not in recipes.usual_methods() and "toy+distill" not in recipes.methods()
    ckpt, quant = open_checkpoint(model), QuantConfig(preset="toy", group_size=32)
    assert plan_quantization(ckpt.config, quant, CPU, torch.float32, False, False).preset == "toy"
    found = run_fingerprint("awq", Session(ckpt, CPU, torch.float32), quant, None)
    assert found["preset"] == "toy" and found["recipe base"] == "toy"
    done = run("quantize", "awq", model, "-o", tmp_path / "out", "--preset", "toy", "--group-size", "32")
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "out").data["recipe"]["base"] == "toy"
    float_weight = ckpt.block(1).linears["down"].weight
    made = open_checkpoint(tmp_path / "out").block(1).linears["down"].weight
    assert isinstance(made, Quantized)
    expected = quantize(float_weight.float() / 2, 4, 32).dequantize()
    torch.testing.assert_close(made.dequantize(), expected)
    table = run(
        "evaluate", "table", model, "--methods", "fp16,toy", "--bits", "4", "--group-size", "32", "--text",
        write_text(tmp_path / "text.txt"), "--windows", "1", "--device", "cpu",
    )  # fmt: skip
    assert table.returncode == 0 and "Toy" in table.stdout, table.stderr


@pytest.mark.usefixtures("toy")
def test_a_name_that_is_taken_and_a_base_that_is_unknown_are_refused() -> None:
    with pytest.raises(UsageError, match="toy is registered already"):
        recipes.register(TOY)
    with pytest.raises(UsageError, match="changes nothing, which is not registered"):
        recipes.register(replace(TOY, name="other", base="nothing"))
    with pytest.raises(UsageError, match=r"expected one of rtn, .* The nearest one is toy"):
        QuantConfig(preset="toi")
    with pytest.raises(UsageError, match="without blanks"):
        replace(TOY, name="my toy")
    with pytest.raises(UsageError, match="toy takes no solver steps"):
        replace(TOY, learning=recipes.recipe_named("best").learning)
    with pytest.raises(UsageError, match="which the preset toy does not read"):
        QuantConfig(preset="toy", distill=True)


def test_an_unfinished_run_of_another_recipe_is_refused_by_the_setting_that_differs(tmp_path) -> None:
    model, text = write_runnable(tmp_path / "model", layers=2), write_text(tmp_path / "text.txt")
    recipe = tmp_path / "mine.yaml"
    command = ("quantize", "awq", model, "-o", tmp_path / "out", "--calib-data", text, *FAST, "--preset")

    def stop() -> None:
        import quant.run

        def nothing(*arguments: object) -> None:
            raise KeyboardInterrupt

        quant.run.AwqWriter.finish_files = nothing  # type: ignore[method-assign]

    recipe.write_text("base: fast\nefforts: {cpu: {sweeps: 2}}\n")
    assert run(*command, recipe, prepare=stop).returncode == 5
    recipe.write_text("base: fast\nefforts: {cpu: {sweeps: 3}}\n")
    other = run(*command, recipe)
    assert other.returncode == 3, other.stderr
    assert "other settings: recipe efforts.cpu.sweeps was 2, is 3." in other.stderr
    recipe.write_text("base: fast\nefforts: {cpu: {sweeps: 2}}\n")
    assert run(*command, recipe).returncode == 0


def test_every_row_states_what_its_function_is_and_is_whole() -> None:
    for row in recipes.rows():
        assert callable(row.function()) and row.summary and row.label
        flat = row.fingerprint(with_distillation=True)
        assert flat["preset"] == row.name
        assert all(isinstance(value, (str, int, float, bool, list, type(None))) for value in flat.values())
    assert not recipes.recipe_named("rtn").reads_float_stream
    assert {r.name for r in recipes.rows() if r.reads_float_stream} == {"awq", "default", "best"}


def test_a_setting_changed_in_python_gives_another_recipe_and_other_bytes(tmp_path) -> None:
    slow = recipes.with_settings("default", steps={"rounds": 5}, effort={"sweeps": 3})
    assert slow.steps is not None and slow.steps.rounds == 5 and slow.effort_on("cuda").sweeps == 3
    assert slow.base == "default" and recipes.recipe_named("default").steps != slow.steps
    with pytest.raises(ValueError, match="rounds is -1"):
        recipes.with_settings("default", steps={"rounds": -1})
    with pytest.raises(UsageError, match="default has no learning"):
        recipes.with_settings("default", learning={"steps": 3})
    assert files_of(tmp_path) == {}


def test_the_recipes_of_the_document_are_what_it_says(tmp_path, monkeypatch) -> None:
    """docs/RECIPES.md: its YAML is read and fits a model; its Python program runs."""
    text = (Path(recipes.__file__).parents[1] / "docs" / "RECIPES.md").read_text("utf8")
    blocks = dict(re.findall(r"^```(yaml|python)\n(.*?)^```", text, re.M | re.S))
    (tmp_path / "careful.yaml").write_text(blocks["yaml"])
    recipe = load_recipe(tmp_path / "careful.yaml")
    config = open_checkpoint(write_runnable(tmp_path / "my-model", layers=30)).config
    quant = QuantConfig(preset=recipe, group_size=32)
    assert skipped_modules(config, quant) == [
        "model.layers.0.mlp.down_proj",
        *(f"model.layers.29.self_attn.{part}_proj" for part in "qkv"),
    ]
    stack = config_of_stack(quant, config, 1, ("o",)).recipe.steps
    assert stack is not None and stack.toward_float == 0.5 and recipe.effort_on("cpu").sweeps == 2
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(blocks["python"], "docs/RECIPES.md", "exec"), {})
        assert (
            recipes.recipe_named("careful").steps
            == recipes.with_settings("default", steps={"rounds": 4}).steps
        )
        made = open_checkpoint(tmp_path / "my-model-shrunk").block(0).linears["up"].weight
        source = open_checkpoint(tmp_path / "my-model").block(0).linears["up"].weight
        assert isinstance(made, Quantized)
        torch.testing.assert_close(made.dequantize(), quantize(source.float() * 0.95, 4, 32).dequantize())
    finally:
        for name in ("careful", "shrunk"):
            recipes.unregister(name)
