"""Recipes from YAML: strict, with the line of every mistake; skipped modules and settings by layer; the record runs again."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_runs import FAST, files_of, run, write_runnable, write_text
from toy_blocks import block_of, config_of, stream_of

from convert.errors import InputError
from convert.folder.output import read_manifest
from convert.readers import open_checkpoint
from kernels.int4 import Quantized
from quant import recipes
from quant.block_task import Streams
from quant.blocks import quantize_block
from quant.config import QuantConfig
from quant.recipe_file import YAML_LIMIT, load_recipe
from quant.selection import config_of_block, selection, skipped_modules

GOOD = """\
base: best
name: mine
steps:
  toward_float: 0.5
  ridges: [0.1, 1]
learning:
  steps: 20
  code_rate: 1e-1
distillation: {steps: 30}
efforts:
  cpu: {rounds: 2}
skip: ["*.mlp.down_proj"]
layers:
  - match: model.layers.0.*
    steps: {rounds: 1}
    learning: null
  - match: "*.self_attn.?_proj"
    steps: {compensate: none}
"""


def test_what_a_file_names_is_changed_and_all_else_is_that_of_its_base(tmp_path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    recipe, base = load_recipe(tmp_path / "r.yaml"), recipes.recipe_named("best")
    assert recipe.name == "mine" and recipe.base == "best" and recipe.function() is base.function()
    assert recipe.steps is not None and base.steps is not None and recipe.learning is not None
    assert (recipe.steps.toward_float, recipe.steps.ridges, recipe.steps.rounds) == (0.5, (0.1, 1.0), 2)
    assert (recipe.learning.steps, recipe.learning.code_rate, recipe.learning.average) == (20, 0.1, 0.95)
    assert recipe.distillation.steps == 30 and recipe.effort_on("cpu").rounds == 2
    assert recipe.effort_on("cuda") == base.effort_on("cuda")
    assert [pattern.glob for pattern in recipe.skip] == ["*.mlp.down_proj"]
    assert recipe.skip[0].where.endswith("r.yaml, line 12")


def test_the_record_of_a_recipe_is_the_recipe(tmp_path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    recipe = load_recipe(tmp_path / "r.yaml")
    for known in (recipe, *recipes.rows()):
        record = tmp_path / "manifest.json"
        record.write_text(json.dumps({"kind": "awq", "recipe": known.to_json()}))
        again = load_recipe(record)
        assert again.to_json() == known.to_json() and again.name == known.name
        assert again == known or known is recipe
        assert again.fingerprint(True) == known.fingerprint(True)


WRONG = {
    "an unknown key": ("base: fast\nspeed: 1\n", 2, "a recipe has no 'speed'"),
    "an unknown setting": ("base: fast\nsteps:\n  scale: true\n  rond: 1\n", 4, "steps has no 'rond'"),
    "a key twice": ("base: fast\nbase: best\n", 2, "a recipe has base twice"),
    "no base": ("name: x\n", 1, "the recipe has no base"),
    "an unknown base": ("\nbase: fastest\n", 2, "expected one of rtn"),
    "a text for a number": ("base: fast\nsteps:\n  rounds: many\n", 3, "'many': expected a whole number"),
    "a quoted number": ("base: fast\nsteps:\n  rounds: '1'\n", 3, "expected a whole number"),
    "a fraction": ("base: fast\nsteps: {rounds: 1.5}\n", 2, "expected a whole number"),
    "yes for true": ("base: fast\nsteps:\n  scale: yes\n", 3, "expected true or false"),
    "a number for true": ("base: fast\nsteps:\n  scale: 1\n", 3, "expected true or false"),
    "no number": ("base: fast\nsteps:\n  toward_float: .nan\n", 3, "expected a number"),
    "a list for a number": ("base: fast\nsteps:\n  rounds: [1]\n", 3, "a list: expected a whole number"),
    "no choice": ("base: fast\nsteps: {compensate: all}\n", 2, "expected one of none, published, static"),
    "out of range": ("base: best\nlearning:\n  average: 1.0\n", 3, "average is 1.0"),
    "steps of rtn": ("base: rtn\nsteps: {rounds: 1}\n", 2, "rtn takes no steps"),
    "learning of awq": ("base: awq\nlearning: {steps: 1}\n", 2, "awq takes no learning"),
    "another device": ("base: fast\nefforts: {tpu: {rounds: 1}}\n", 2, "efforts has no 'tpu'"),
    "the name of a preset": ("base: fast\nname: best\n", 1, "the name of the preset best"),
    "a name with blanks": ("base: fast\nname: my best\n", 1, "without blanks"),
    "an old revision": ("base: awq\nrevision: 1\n", 2, "which has revision 2 now"),
    "a list": ("- base: fast\n", 1, "a recipe is a list"),
    "skip that is no list": ("base: fast\nskip: model.layers.0\n", 2, "expected a list"),
    "an empty pattern": ("base: fast\nskip: ['']\n", 2, "is empty"),
    "a rule without match": ("base: fast\nlayers:\n  - steps: {rounds: 1}\n", 3, "needs match"),
    "a rule that changes nothing": ("base: fast\nlayers:\n  - match: a\n", 3, "at least one of steps"),
    "learning by layer alone": (
        "base: fast\nlayers:\n  - match: a\n    learning: {steps: 1}\n",
        4,
        "no learning",
    ),
    "an anchor": ("base: &x fast\nname: *x\n", 1, "anchors (&) and aliases"),
    "an alias": ("base: fast\nskip: [*x]\n", 2, "stands in quotes"),
    "a star": ("base: fast\nskip:\n  - *.mlp.down_proj\n", 3, "stands in quotes"),
    "a tag": ("base: !!python/name:os.system fast\n", 1, "expected a text"),
    "no YAML": ("base: [fast\n", 2, "this is no YAML"),
    "two documents": ("base: fast\n---\nbase: best\n", 2, "this is no YAML"),
    "a merge": ("base: fast\n<<: {steps: {rounds: 1}}\n", 2, "a recipe has no '<<'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_refused_with_its_line(case: str, tmp_path) -> None:
    text, line, words = WRONG[case]
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        load_recipe(path)
    assert f"wrong.yaml, line {line}: " in str(refused.value) and words in str(refused.value)


def test_files_that_are_no_recipe_are_refused(tmp_path) -> None:
    bomb = "a: [" * 20000
    for name, data, words in (
        ("empty.yaml", b"", "is empty"),
        ("deep.yaml", bomb.encode()[:YAML_LIMIT], "no YAML"),
        ("large.yaml", b"#" * (YAML_LIMIT + 1), "above the limit"),
        ("binary.yaml", b"\xff\xfe\x00", "no text in UTF-8"),
        ("control.yaml", b"base: \x07fast", "no YAML"),
        ("other.json", b'{"kind": "statistics"}', "holds no recipe"),
        ("list.json", b"[]", "expected an object"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=words):
            load_recipe(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        load_recipe(tmp_path / "absent.yaml")


PATTERNS = {
    "nothing is matched": (
        "skip: [model.layers.9.mlp.down_proj]",
        "names no linear of this model's 4 blocks",
    ),
    "a part of q, k, v": (
        "skip: ['*.0.self_attn.q_proj']",
        "fuse it with model.layers.0.self_attn.k_proj, model",
    ),
    "a part of gate, up": (
        "skip: ['*.1.mlp.up_proj']",
        "fuse it with model.layers.1.mlp.gate_proj: skip all or none",
    ),
    "steps of a part": (
        "layers: [{match: '*.2.mlp.gate_proj', steps: {rounds: 1}}]",
        "solved together with model.layers.2.mlp.up_proj",
    ),
    "rounding of a part": (
        "layers: [{match: '*.2.mlp.*', learning: null}]",
        "learned block by block: match model.layers.2.self_attn",
    ),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_that_do_not_fit_the_model_are_refused_with_their_line(case: str, tmp_path) -> None:
    text, words = PATTERNS[case]
    (tmp_path / "r.yaml").write_text(f"base: best\n{text}\n")
    ckpt = open_checkpoint(write_runnable(tmp_path / "model"))
    with pytest.raises(InputError) as refused:
        selection(load_recipe(tmp_path / "r.yaml"), ckpt.config)
    assert "r.yaml, line 2: " in str(refused.value) and words in str(refused.value)


def test_experts_are_skipped_all_together_and_heads_may_be_named(tmp_path) -> None:
    config = config_of("mixtral")
    names = "model.layers.0.block_sparse_moe"
    (tmp_path / "r.yaml").write_text(f"base: fast\nskip: [lm_head, '{names}.gate', '{names}.experts.1.*']\n")
    with pytest.raises(InputError, match=r"experts\.1\.w2 alone, but engines fuse it with .*experts\.0\.w1"):
        selection(load_recipe(tmp_path / "r.yaml"), config)
    (tmp_path / "r.yaml").write_text(f"base: fast\nskip: [lm_head, '{names}.gate', '{names}.experts.*']\n")
    quant = QuantConfig(preset=load_recipe(tmp_path / "r.yaml"), group_size=32)
    assert len(skipped_modules(config, quant)) == 12
    x = stream_of(config)
    with torch.no_grad():
        result = quantize_block(block_of(config), config, quant, Streams(x, x), "cpu", torch.float32)
    integers = {r for r, part in result.weights.linears.items() if isinstance(part.weight, Quantized)}
    assert integers == {"q", "k", "v", "o"} == {report.role for report in result.reports}


@pytest.mark.parametrize("preset", ["rtn", "gptq", "awq", "fast", "default", "best"])
def test_every_recipe_leaves_what_is_skipped_in_float(preset: str, tmp_path) -> None:
    learning = "learning: {steps: 4}\n" if preset == "best" else ""
    (tmp_path / "r.yaml").write_text(
        f"base: {preset}\n{learning}skip: ['*.self_attn.[qkv]_proj', '*.mlp.down_proj']\n"
    )
    config, quant = config_of("llama"), QuantConfig(preset=load_recipe(tmp_path / "r.yaml"), group_size=32)
    block, x = block_of(config), stream_of(config)
    with torch.no_grad():
        result = quantize_block(block, config, quant, Streams(x, x.clone()), "cpu", torch.float32)
    for role, part in result.weights.linears.items():
        assert isinstance(part.weight, Quantized) == (role in ("o", "gate", "up")), role
    for role in ("q", "k", "down"):
        torch.testing.assert_close(result.weights.linears[role].weight, block.linears[role].weight.half())


def test_settings_by_layer_hold_where_they_are_asked_for(tmp_path) -> None:
    """A block that a rule names is that of the recipe with these settings; the other is untouched."""
    config = config_of("llama")
    (tmp_path / "r.yaml").write_text(
        "base: default\nlayers:\n  - match: '*.self_attn.*'\n    steps: {compensate: none, rounds: 0}\n"
    )
    mixed = QuantConfig(preset=load_recipe(tmp_path / "r.yaml"), group_size=32)
    plain = recipes.with_settings("default", steps={"compensate": "none", "rounds": 0})
    block, x = block_of(config), stream_of(config)
    results = {}
    for name, quant in (
        ("mixed", mixed),
        ("default", QuantConfig(group_size=32)),
        ("plain", QuantConfig(preset=plain, group_size=32)),
    ):
        with torch.no_grad():
            done = quantize_block(block, config, quant, Streams(x, x.clone()), "cpu", torch.float32)
        results[name] = done.weights.linears
    for role, same, other in (("q", "plain", "default"), ("o", "plain", "default")):
        assert torch.equal(results["mixed"][role].weight.codes, results[same][role].weight.codes)
        assert not torch.equal(results["mixed"][role].weight.codes, results[other][role].weight.codes)
    assert not torch.equal(results["mixed"]["down"].weight.codes, results["plain"]["down"].weight.codes)


def test_rounding_is_learned_in_the_blocks_that_ask_for_it(tmp_path) -> None:
    (tmp_path / "r.yaml").write_text(
        "base: best\nlayers:\n  - match: model.layers.0.*\n    learning: null\n"
        "  - match: model.layers.1.*\n    learning: {steps: 7}\n"
    )
    quant = QuantConfig(preset=load_recipe(tmp_path / "r.yaml"), group_size=32)
    config = open_checkpoint(write_runnable(tmp_path / "model")).config
    found = [config_of_block(quant, config, index).recipe.learning for index in range(3)]
    assert found[0] is None and found[1] is not None and found[1].steps == 7
    assert found[2] == recipes.recipe_named("best").learning and config_of_block(quant, config, 2) is quant


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model quantized by a recipe that skips modules of one layer, and the command that did it."""
    place = tmp_path_factory.mktemp("made")
    model, text = write_runnable(place / "model"), write_text(place / "text.txt")
    (place / "mine.yaml").write_text(
        "base: fast\nskip:\n  - model.layers.1.mlp.down_proj\n  - model.layers.3.self_attn.[qkv]_proj\n"
    )
    command = ("quantize", "awq", model, "--calib-data", text, *FAST)
    done = run(*command, "-o", place / "out", "--preset", place / "mine.yaml")
    assert done.returncode == 0, done.stderr
    return place, command, done


SKIPPED = ("model.layers.1.mlp.down_proj", *(f"model.layers.3.self_attn.{p}_proj" for p in "qkv"))


def test_skipped_modules_are_float_listed_and_reported(made) -> None:
    place, _, done = made
    config = json.loads((place / "out" / "config.json").read_text())
    entries = config["quantization_config"]["modules_to_not_convert"]
    # engines that hold q, k and v in one matrix look for its name
    assert set(entries) == {"lm_head", *SKIPPED, "model.layers.3.self_attn.qkv_proj"}
    names = set()
    for path in (place / "out").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    for module in SKIPPED:
        assert f"{module}.weight" in names and f"{module}.qweight" not in names
    assert "model.layers.2.mlp.down_proj.qweight" in names
    manifest = read_manifest(place / "out").data
    assert any("4 modules stay float16, as the recipe asks" in text for text in manifest["warnings"])
    assert "4 modules stay float16, as the recipe asks" in done.stderr  # of the plan, before the work
    assert "model.layers.1.mlp.down_proj" in done.stdout
    assert manifest["recipe"]["skip"][0] == "model.layers.1.mlp.down_proj"
    assert manifest["config"]["preset"] == manifest["recipe"]["name"] == "mine"
    ckpt = open_checkpoint(place / "out")
    assert isinstance(ckpt.block(1).linears["up"].weight, Quantized)
    assert not isinstance(ckpt.block(1).linears["down"].weight, Quantized)


def test_the_recipe_of_a_manifest_runs_again_to_the_same_bytes(made) -> None:
    place, command, _ = made
    again = run(*command, "-o", place / "again", "--preset", place / "out" / "tmq" / "manifest.json")
    assert again.returncode == 0, again.stderr
    assert files_of(place / "out") == files_of(place / "again")


def test_a_wrong_recipe_is_one_message_of_the_command(made) -> None:
    place, command, _ = made
    (place / "wrong.yaml").write_text("base: fast\nsteps:\n  rounds: many\n")
    done = run(*command, "-o", place / "no", "--preset", place / "wrong.yaml")
    assert done.returncode == 3 and "wrong.yaml, line 3: steps.rounds is 'many'" in done.stderr
    (place / "wrong.yaml").write_text("base: fast\nskip: [layers.7]\n")
    done = run(*command, "-o", place / "no", "--preset", place / "wrong.yaml", "--dry-run")
    assert done.returncode == 3 and "wrong.yaml, line 2: 'layers.7' names no linear" in done.stderr
    assert not (place / "no").exists()


def test_a_recipe_file_is_a_row_of_the_table(made) -> None:
    place, command, _ = made
    (place / "loose.yaml").write_text("base: rtn\nskip: ['*.mlp.*']\n")
    done = run(
        "evaluate", "table", command[2], "--methods", f"rtn,{place / 'loose.yaml'}", "--bits", "3",
        "--group-size", "32", "--text", place / "text.txt", "--windows", "2", "--kl-windows", "2",
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["method"] for row in rows] == ["rtn", "loose"]
    assert rows[1]["kl"] < rows[0]["kl"]  # fewer modules are rounded
