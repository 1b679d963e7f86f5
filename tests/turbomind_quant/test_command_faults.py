"""What the commands say of inputs that are damaged, of another kind, or that nothing reads: exit code and message."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import run, write_runnable, write_text

RTN = ("--preset", "rtn", "--group-size", 32, "--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("faults")
    write_runnable(folder / "model", layers=2)
    text = write_text(folder / "text.txt")
    reading = ("--calib-data", text, "--samples", 4, "--seqlen", 32, "--device", "cpu")
    assert run("quantize", "calibrate", folder / "model", "-o", folder / "stats", *reading).returncode == 0
    return folder


def test_statistics_are_verified(place):
    done = run("quantize", "verify", place / "stats", "--source", place / "model")
    assert done.returncode == 0, done.stdout
    assert "(statistics): all checks passed" in done.stdout and "of 2 blocks" in done.stdout
    assert "ok   source" in done.stdout


def test_damaged_statistics_fail(place, tmp_path):
    text = ("--calib-data", place / "text.txt", "--samples", 4, "--seqlen", 32, "--device", "cpu")
    assert run("quantize", "calibrate", place / "model", "-o", tmp_path / "stats", *text).returncode == 0
    path = tmp_path / "stats" / "block-00001.safetensors"
    tensors = load_file(path)
    tensors[next(name for name in tensors if name.endswith(".mean_abs"))][0] = torch.nan
    save_file(tensors, path)
    done = run("quantize", "verify", tmp_path / "stats")
    assert done.returncode == 3 and "FAIL digests" in done.stdout
    assert "FAIL statistics" in done.stdout and "1 NaN" in done.stdout
    write_runnable(tmp_path / "other", layers=2, seed=4)
    done = run("quantize", "verify", place / "stats", "--source", tmp_path / "other")
    assert done.returncode == 3 and "FAIL source" in done.stdout


@pytest.mark.parametrize(
    "command",
    [("quantize", "inspect"), ("evaluate", "ppl"), ("quantize", "awq"), ("quantize", "pack")],
    ids=" ".join,
)
def test_statistics_given_as_a_model(command, place, tmp_path):
    output = ("-o", tmp_path / "out") if command[1] in ("awq", "pack") else ()
    done = run(*command, place / "stats", *output)
    assert done.returncode == 3, done.stdout
    assert "calibration statistics" in done.stderr and "--stats" in done.stderr


UNREAD = {
    "file": (["--calib-data", "nothere.txt"], ["--calib-data"]),
    "column": (["--text-column", "x", "--samples", "7"], ["--text-column"]),
    "all": (["--calib-data", "nothere.txt", "--allow-fewer"], ["--calib-data", "--allow-fewer"]),
    "pad": (["--pad", "--keep-ragged"], ["--pad", "--keep-ragged"]),
}


@pytest.mark.parametrize("case", UNREAD)
def test_options_that_would_do_nothing(case, place, tmp_path):
    arguments, named = UNREAD[case]
    done = run("quantize", "awq", place / "model", "-o", tmp_path / "out", *RTN, *arguments)
    assert done.returncode == 2 and all(name in done.stderr for name in named), done.stderr
    assert not (tmp_path / "out").exists()


def test_an_amount_of_text_that_nothing_reads_is_noted(place, tmp_path):
    arguments = ("awq", place / "model", "-o", tmp_path / "out", *RTN)
    done = run("quantize", *arguments, "--samples", 7, "--seqlen", 32)
    assert done.returncode == 0, done.stderr
    assert "note: rtn reads no calibration text: --samples, --seqlen without effect" in done.stderr
    assert "without effect" not in run("quantize", *arguments, "--dry-run").stderr
    typed = ("--calib-data", place / "text.txt", "--samples", 4, "--seqlen", 32, "--kv-bits", 8)
    done = run("quantize", "awq", place / "model", "-o", tmp_path / "kv", *RTN, *typed)
    assert done.returncode == 0 and "without effect" not in done.stderr, done.stderr


@pytest.mark.parametrize("content", ["{}", "no json", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_refused_before_the_work(content, place, tmp_path):
    model = write_runnable(tmp_path / "model", layers=2)
    (model / "tokenizer.json").write_text(content)
    done = run("quantize", "awq", model, "-o", tmp_path / "out", *RTN)
    assert done.returncode == 3 and "tokenizer" in done.stderr and str(model) in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
    done = run("quantize", "pack", model, "-o", tmp_path / "out")
    assert done.returncode == 3 and "tokenizer" in done.stderr and not (tmp_path / "out").exists()
    done = run("quantize", "verify", model)
    assert done.returncode == 3 and "FAIL tokenizer" in done.stdout and "ok   ranges" in done.stdout


def test_verify_loads_the_tokenizer_or_says_that_there_is_none(place, tmp_path):
    done = run("quantize", "verify", place / "model")
    assert done.returncode == 6 and "ok   tokenizer: it loads, with 259 ids" in done.stdout
    model = write_runnable(tmp_path / "model", layers=2)
    (model / "tokenizer.json").unlink()
    done = run("quantize", "verify", model)
    assert done.returncode == 6 and "note: no tokenizer file" in done.stdout
    assert run("quantize", "awq", model, "-o", tmp_path / "out", *RTN).returncode == 0


def test_inspect_of_a_model_that_cannot_be_used_fails(place, tmp_path):
    model = write_runnable(tmp_path / "model", layers=2)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    done = run("quantize", "inspect", model)
    assert done.returncode == 3 and "cannot be used" in done.stdout and "MiB in" in done.stdout
    done = run("quantize", "inspect", model, "--json")
    assert done.returncode == 3 and json.loads(done.stdout)["problem"]
    assert run("quantize", "inspect", place / "model").returncode == 0
