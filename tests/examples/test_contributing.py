"""The Python blocks of CONTRIBUTING.md, run as they stand: the new family, recipe and kernel do what the page says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from safetensors.torch import load_file, save_file
from tiny_runs import run, write_runnable, write_text

from convert.families import rows, table
from convert.families.family import Family
from convert.readers import open_checkpoint
from quant import recipes

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


def block(heading: str) -> str:
    """The Python block below a heading."""
    page = PAGE.read_text(encoding="utf8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found = re.search(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert found is not None, heading
    return found[1]


def execute(heading: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block(heading), f"CONTRIBUTING.md, {heading}", "exec"), names)
    return names


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Family:
    found: Family = execute("Add a model family")["family"]
    monkeypatch.setitem(table.BY_NAME, found.name, found)
    monkeypatch.setattr(table, "FAMILIES", (*rows.FAMILIES, found))
    return found


def test_a_family_of_known_parts_is_one_short_row() -> None:
    assert len(block("Add a model family").splitlines()) < 40


def test_a_new_family_gives_what_the_same_weights_give_as_a_llama(family: Family, tmp_path: Path) -> None:
    llama = write_runnable(tmp_path / "llama", layers=2)
    other = tmp_path / "other"
    other.mkdir()
    for file in llama.iterdir():
        if file.suffix != ".safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    tensors = {}
    for name, tensor in load_file(llama / "model.safetensors").items():
        tensors[renamed(name, family)] = tensor
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    config |= {"architectures": [family.architecture], "model_type": "example"}
    (other / "config.json").write_text(json.dumps(config))
    text = write_text(tmp_path / "text.txt")
    outputs = []
    for source in (llama, other):
        out = tmp_path / f"{source.name}-4bit"
        flags = ("--preset", "default", "--group-size", "32", "--samples", "4", "--seqlen", "32")
        done = run("quantize", "awq", source, "-o", out, *flags, "--calib-data", text, "--device", "cpu")
        assert done.returncode == 0, done.stderr
        outputs.append(open_checkpoint(out))
    for index in range(2):
        ours, theirs = (checkpoint.block(index).linears for checkpoint in outputs)
        assert ours.keys() == theirs.keys()
        for role, part in ours.items():
            assert torch.equal(part.weight.codes, theirs[role].weight.codes), role  # type: ignore[union-attr]


def renamed(name: str, family: Family) -> str:
    """A tensor's name of a Llama in the names of the new family."""
    llama = table.BY_NAME["llama"]
    for old, new in (
        (llama.embedding, family.embedding),
        (llama.final_norm, family.final_norm),
        (llama.lm_head, family.lm_head),
    ):
        if name == f"{old}.weight":
            return f"{new}.weight"
    index, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name).groups()  # type: ignore[union-attr]
    roles = {module: role for parts in (llama.linears, llama.norms) for role, module in parts.items()}
    module = {**family.linears, **family.norms}[roles[rest]]
    return family.block.format(i=index) + module + ".weight"


@pytest.fixture
def quick() -> Iterator[str]:
    execute("Add a recipe")
    yield "quick"
    recipes.unregister("quick")


def test_a_new_recipe_is_known_everywhere(quick: str, tmp_path: Path) -> None:
    assert len(block("Add a recipe").splitlines()) < 30
    model, text = write_runnable(tmp_path / "model", layers=2), write_text(tmp_path / "text.txt")
    flags = (
        "--group-size",
        "32",
        "--samples",
        "4",
        "--seqlen",
        "32",
        "--calib-data",
        text,
        "--device",
        "cpu",
    )
    done = run("quantize", "awq", model, "-o", tmp_path / "out", "--preset", quick, *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "tmq" / "manifest.json").read_text())["config"]["preset"] == quick


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels were imported for a GPU")
def test_the_kernel_of_the_page_sums() -> None:
    execute("Add a kernel")
