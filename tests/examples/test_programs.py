"""Every program of examples/, run as a reader would run it, on a tiny model."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import write_runnable, write_text

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    write_runnable(folder / "model", max_position_embeddings=256)
    write_text(folder / "text.txt", length=200_000)
    return folder


def example(place: Path, name: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMQ_CACHE": str(place / "cache")}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_quantize_then_evaluate_then_read_the_report(place: Path) -> None:
    said = example(place, "quantize.py", "model", "made", "text.txt")
    assert "made: 4.156 bits a weight" in said and "4/4" in said
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    said = example(place, "evaluate.py", "model", "made", "page.html", "2")
    assert "difference, 95 %:" in said and (place / "page.html").stat().st_size > 1000
    said = example(place, "read_report.py", "made")
    assert "layer 3:" in said and "every byte is as it was written" in said


def test_an_own_recipe(place: Path) -> None:
    assert "made by the recipe careful" in example(place, "own_recipe.py", "model", "careful")


def test_chat(place: Path) -> None:
    said = example(place, "chat.py", "model")
    assert " tokens)" in said and len(said.splitlines()) >= 4


def test_serve_and_call(place: Path) -> None:
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert example(place, "serve_and_call.py", "model", str(port)).strip()


def test_every_example_is_run() -> None:
    text = Path(__file__).read_text(encoding="utf8")
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))
