"""The short form of scripts/fuzz: its corpus and mutations of it are taken or refused by a named error; atheris runs where installed."""

import importlib.util
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.fuzz import targets
from scripts.fuzz.run import CORPUS, NAMES

RUN = Path(CORPUS).parent / "run.py"


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    yield
    targets.remove_place()


def mutated(data: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled or put in."""
    raw = bytearray(data)
    for _ in range(dice.randrange(1, 5)):
        at = dice.randrange(len(raw) + 1)
        kind = dice.randrange(4)
        if kind == 0 and at < len(raw):
            raw[at] = dice.randrange(256)
        elif kind == 1:
            del raw[at : at + dice.randrange(1, 9)]
        elif kind == 2:
            raw[at:at] = raw[at : at + dice.randrange(1, 33)]
        else:
            raw[at:at] = dice.choice(
                [b"9" * 30, b"-1", b"null", b"[", b"{}", b"\xff\xff\xff\xff", b"NaN", b"\\ud800"]
            )
    return bytes(raw)


def test_J111_every_reader_has_a_target_and_a_small_corpus() -> None:
    assert set(targets.TARGETS) == set(NAMES)
    for name in NAMES:
        seeds = sorted((CORPUS / name).iterdir())
        assert seeds and all(seed.stat().st_size < 4096 for seed in seeds)
        taken = [targets.call(name, seed.read_bytes()) for seed in seeds]
        assert any(taken) or name == "manifest", name  # its seed lists a file that is not there


@pytest.mark.parametrize("name", NAMES, ids=lambda n: f"J111-{n}")
def test_damaged_content_is_refused_by_a_named_error_alone(name: str) -> None:
    dice = random.Random(name)
    seeds = [seed.read_bytes() for seed in sorted((CORPUS / name).iterdir())]
    for _ in range(150):
        data = mutated(dice.choice(seeds), dice)
        try:
            targets.call(name, data)
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} for {data!r}") from error


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_J111_the_fuzzer_runs_and_finds_what_is_there(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(RUN),
        "--runs",
        "300",
        "--targets",
        "safetensors",
        "--findings",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "0 targets with findings" in done.stdout, done.stdout + done.stderr
