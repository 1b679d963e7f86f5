"""`quantize pack --format` as a user gives it, and `tmq.pack`: every format is evaluated, verified and inspected like its source."""

import json
from pathlib import Path

import pytest
from tiny_runs import FAST, run, write_runnable, write_text

import turbomind_quant as tmq
from convert.errors import UsageError

INT4 = ("awq", "compressed-tensors", "gptq", "mlx")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its 4-bit checkpoint and a text; the tokenizer has a merge, without which GGUF has no form for it."""
    folder = tmp_path_factory.mktemp("pack")
    write_runnable(folder / "model", layers=2)
    config = json.loads((folder / "model/config.json").read_text())
    config |= {"bos_token_id": 257, "eos_token_id": 259}
    (folder / "model/config.json").write_text(json.dumps(config))
    path = folder / "model/tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"]["ab"] = 256
    document["model"]["merges"] = [["a", "b"]]
    for entry in document["added_tokens"]:
        entry["id"] += 1
    path.write_text(json.dumps(document))
    write_text(folder / "text.txt")
    done = run(
        "quantize", "awq", folder / "model", "-o", folder / "q", "--preset", "rtn", *FAST[:2], *FAST[-2:]
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_format_has_the_perplexity_of_its_source(place: Path) -> None:
    paths = [place / "q"]
    for target in (*INT4, "gguf", "float16"):
        done = run("quantize", "pack", place / "q", "-o", place / f"as-{target}", "--format", target)
        assert done.returncode == 0, done.stderr
        assert f"next: quantize verify {place / f'as-{target}'}" in done.stdout
        verified = run("quantize", "verify", place / f"as-{target}", "--source", place / "q")
        assert verified.returncode == 0, verified.stdout
        assert run("quantize", "inspect", place / f"as-{target}").returncode == 0
        paths.append(place / f"as-{target}")
    done = run("evaluate", "ppl", *paths, "--text", place / "text.txt", "--windows", 2, "--json")
    assert done.returncode == 0, done.stderr
    source, *rows = json.loads(done.stdout)["rows"]
    for target, row in zip((*INT4, "gguf", "float16"), rows, strict=True):
        if target in INT4:
            assert row["nll"] == source["nll"]
        else:  # one rounding of m = -z * s, or of each weight to float16
            assert row["nll"] == pytest.approx(source["nll"], abs=1e-3)


def test_pack_of_the_library_says_what_it_wrote(place: Path, tmp_path: Path) -> None:
    plan = tmq.estimate_pack(place / "q", tmp_path / "out", format="mlx")
    assert plan.format == "mlx" and plan.weight_type == "int4" and plan.output_state == "absent"
    result = tmq.pack(place / "q", tmp_path / "out", format="mlx")
    assert result.files == 3 and result.weight_bytes <= plan.output_bytes
    assert tmq.inspect(tmp_path / "out").kind == "mlx"


def test_settings_of_another_format_are_refused(place: Path, tmp_path: Path) -> None:
    done = run("quantize", "pack", place / "q", "-o", tmp_path / "o", "--format", "mlx", "--tp", 2)
    assert done.returncode == 2 and "--tp belongs to --format turbomind" in done.stderr
    done = run("quantize", "pack", place / "q", "-o", tmp_path / "o", "--rest", "q8_0")
    assert done.returncode == 2 and "--rest belongs to --format gguf" in done.stderr
    with pytest.raises(UsageError, match="expected one of turbomind"):
        tmq.pack(place / "q", tmp_path / "o", format="onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "o").exists()


def test_a_dry_run_writes_nothing(place: Path, tmp_path: Path) -> None:
    done = run(
        "quantize", "pack", place / "q", "-o", tmp_path / "o", "--format", "gguf", "--dry-run", "--json"
    )
    assert done.returncode == 0 and json.loads(done.stdout)["format"] == "gguf"
    assert not (tmp_path / "o").exists()


def test_a_float_model_is_not_packed_as_int4(place: Path, tmp_path: Path) -> None:
    done = run("quantize", "pack", place / "model", "-o", tmp_path / "o", "--format", "gptq")
    assert done.returncode == 3 and "Quantize it first" in done.stderr


def test_awq_writes_another_format_in_one_command(place: Path, tmp_path: Path) -> None:
    """Stopped after the AWQ checkpoint the same command goes on from it; other settings are refused by name."""
    options = ("--preset", "rtn", *FAST[:2], *FAST[-2:], "--format", "compressed-tensors")
    command = ("quantize", "awq", place / "model", "-o", tmp_path / "o")
    done = run(*command, *options)
    assert done.returncode == 0, done.stderr
    assert tmq.inspect(tmp_path / "o").kind == "compressed-tensors"
    assert tmq.inspect(tmp_path / "o-awq").kind == "awq"
    assert run(*command, *options).returncode == 3  # both are finished
    packed = {path.name: path.read_bytes() for path in (tmp_path / "o").glob("*.safetensors")}
    before = (tmp_path / "o-awq/tmq/manifest.json").stat().st_mtime_ns
    for path in sorted((tmp_path / "o").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "o").rmdir()
    refused = run(*command, *options, "--symmetric")
    assert refused.returncode == 3 and "symmetric" in refused.stderr
    assert run(*command, *options).returncode == 0
    assert (tmp_path / "o-awq/tmq/manifest.json").stat().st_mtime_ns == before
    assert packed == {path.name: path.read_bytes() for path in (tmp_path / "o").glob("*.safetensors")}


def test_awq_refuses_what_the_format_cannot_hold_before_the_work(place: Path, tmp_path: Path) -> None:
    command = (
        "quantize",
        "awq",
        place / "model",
        "-o",
        tmp_path / "o",
        "--preset",
        "rtn",
        *FAST[:2],
        *FAST[-2:],
    )
    done = run(*command, "--bits", 3, "--format", "gptq")
    assert done.returncode == 2 and "4-bit codes alone" in done.stderr
    done = run(*command, "--format", "gptq", "--for", "vllm")
    assert done.returncode == 3 and "zero points other than 8" in done.stderr
    assert not list(tmp_path.iterdir())
