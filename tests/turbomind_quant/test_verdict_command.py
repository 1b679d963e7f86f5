"""`quantize inspect --for` and `quantize awq --for` on files: facts are found in them, exit codes follow, the work does not begin."""

import json
from pathlib import Path

import pytest
from tiny_runs import FAST, run, write_runnable

import turbomind_quant as tmq
from convert.verdict.artefact import artefact_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verdict")
    write_runnable(folder / "model", layers=2)
    options = ("--preset", "rtn", *FAST[:2], *FAST[-2:])
    for name, more in (("a", ()), ("s", ("--symmetric",))):
        done = run("quantize", "awq", folder / "model", "-o", folder / name, *options, *more)
        assert done.returncode == 0, done.stderr
        for target in ("compressed-tensors", "gptq", "mlx"):
            assert run(
                "quantize", "pack", folder / name, "-o", folder / f"{name}-{target}", "--format", target
            )
    return folder


@pytest.mark.parametrize(
    ("name", "engine", "code", "told"),
    [
        ("a", "vllm", 0, "vllm 0.33.0: loads"),
        ("a", "lmdeploy", 3, "groups of 128 alone, found groups of 32"),
        ("a-compressed-tensors", "lmdeploy", 0, "lmdeploy 0.18.0: loads"),
        ("a-compressed-tensors", "lmdeploy:0.7.3", 3, "compressed-tensors is not read"),
        ("a-gptq", "vllm", 3, "zero points other than 8"),
        ("s-gptq", "vllm", 0, "vllm 0.33.0: loads"),
        ("s-compressed-tensors", "sglang", 3, "no multiple of 128"),
        ("a-mlx", "mlx", 0, "mlx 0.32.2: loads"),
        ("a", "transformers", 0, "loads, with a caveat"),
        ("model", "llama.cpp", 3, "llama.cpp reads GGUF"),
    ],
)
def test_inspect_for(name: str, engine: str, code: int, told: str, place: Path) -> None:
    done = run("quantize", "inspect", place / name, "--for", engine)
    assert done.returncode == code, done.stderr
    assert told in done.stdout


def test_facts_are_found_in_the_files(place: Path) -> None:
    for name, symmetric in (("a", False), ("s", True), ("s-mlx", True)):
        facts = artefact_of(place / name)
        assert facts.group_size == 32 and facts.bits == 4 and facts.symmetric is symmetric
        assert not facts.float_linears and facts.packed_shapes()["down"] == (64, 96)
    assert artefact_of(place / "model").format == "float"


def test_the_verdict_is_part_of_the_json(place: Path) -> None:
    done = run("quantize", "inspect", place / "a", "--for", "vllm:0.40", "--tp", 4, "--json")
    verdict = json.loads(done.stdout)["verdict"]
    assert verdict["engine"] == "vllm" and verdict["tp"] == 4 and "was not read" in verdict["notes"][0]
    assert verdict["outcome"] == "fails"  # down: 96 inputs, 24 for each of 4 ranks
    assert tmq.inspect(place / "a").verdict is None


def test_awq_asks_the_engine_before_the_work(place: Path, tmp_path: Path) -> None:
    options = ("--preset", "rtn", *FAST[:2], *FAST[-2:])
    done = run("quantize", "awq", place / "model", "-o", tmp_path / "o", "--for", "lmdeploy", *options)
    assert done.returncode == 3 and "--group-size 128" in done.stderr and not (tmp_path / "o").exists()
    done = run("quantize", "awq", place / "model", "-o", tmp_path / "o", "--for", "transformers", *options)
    assert done.returncode == 0 and "gptqmodel" in done.stderr
    done = run("quantize", "awq", place / "model", "-o", tmp_path / "p", "--for", "nobody", *options)
    assert done.returncode == 2 and "expected one of" in done.stderr
