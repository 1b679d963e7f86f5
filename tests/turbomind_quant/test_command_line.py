"""What all commands share: versions, hints at near names, shell completion, `python -m`, and light groups."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from turbomind_quant.cli import evaluate as evaluate_commands
from turbomind_quant.cli import options, throughput
from turbomind_quant.cli import quantize as quantize_commands
from turbomind_quant.cli.evaluate import evaluate
from turbomind_quant.cli.quantize import quantize
from turbomind_quant.cli.tmq import tmq

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=env)


@pytest.mark.parametrize("group", [tmq, quantize, evaluate], ids=lambda group: group.name)
def test_versions(group: click.Group) -> None:
    result = CliRunner().invoke(group, ["--version"], prog_name=group.name)
    assert result.exit_code == 0
    assert result.output == f"{group.name}, version {version('turbomind-quant')}\n"


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["quantise"], "quantize"),
        (["quantize", "awk"], "awq"),
        (["evaluate", "compre"], "compare"),
        (["quantize", "awq", "m", "-o", "o", "--calib-dat", "x"], "--calib-data"),
        (["serve", "m", "--server-prt", "1"], "--server-port"),
        (["xyzzy"], None),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_near_names_are_hinted_at(arguments: list[str], near: str | None) -> None:
    result = CliRunner().invoke(tmq, arguments)
    said = re.sub(r"\s+", " ", result.output)
    assert result.exit_code == 2
    assert "Did you mean" not in said if near is None else re.search(rf"Did you mean.* '{near}'", said), said


def test_python_m_is_tmq() -> None:
    done = python("-m", "turbomind_quant", "quantize", "awq", "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage: tmq quantize awq [OPTIONS] MODEL")
    wrong = python("-m", "turbomind_quant", "quantize", "awq")
    assert wrong.returncode == 2 and "Usage: tmq quantize awq" in wrong.stderr


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("tmq qua", {"quantize"}),
        ("tmq evaluate ", {"compare", "ppl", "report", "table", "throughput"}),
        ("tmq quantize awq --kv", {"--kv-bits"}),
        ("tmq quantize awq --preset be", {"best"}),
        ("tmq quantize pack --format g", {"gguf", "gptq"}),
    ],
)
def test_a_shell_completes_names(words: str, completions: set[str]) -> None:
    parts = words.split(" ")
    environment = {
        "_TMQ_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(parts) - 1),
    }
    done = python("-c", "from turbomind_quant.cli.tmq import tmq; tmq(prog_name='tmq')", **environment)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == completions, done.stderr


def test_the_script_of_completion_is_printed() -> None:
    code = "from turbomind_quant.cli.tmq import tmq; tmq(prog_name='tmq')"
    done = python("-c", code, _TMQ_COMPLETE="bash_source")
    assert done.returncode == 0 and "complete -o nosort" in done.stdout


VALUES = {
    "calibrate": (quantize, options.CalibrateOptions),
    "awq": (quantize, options.QuantizeOptions),
    "pack": (quantize, quantize_commands.PackOptions),
    "ppl": (evaluate, evaluate_commands.PerplexityOptions),
    "compare": (evaluate, evaluate_commands.CompareOptions),
    "table": (evaluate, evaluate_commands.TableOptions),
    "throughput": (evaluate, throughput.ThroughputOptions),
}
OWN = {
    "path",
    "model",
    "output",
    "restart",
    "dry_run",
    "as_json",
    "paths",
    "a",
    "b",
    "prompt",
    "random_weights",
}


@pytest.mark.parametrize("name", VALUES)
def test_flags_have_the_types_that_are_handed_on(name: str) -> None:
    """mypy compares these types with the library; here the flags are compared with these types."""
    group, values = VALUES[name]
    flags = {option.name for option in group.commands[name].params} - {"debug"}
    typed = set(values.__annotations__)
    assert typed <= flags and flags - typed <= OWN
