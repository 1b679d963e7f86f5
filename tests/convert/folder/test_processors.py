"""Processors by affinity and by the quota of a container, and what OpenMP is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convert.folder import processors
from convert.folder.processors import choose_threads, usable_processors


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that lets this process use eight processors, and an empty tree of cgroups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(processors, "CGROUP", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "count"),
    [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("1600000 100000", 8), ("nonsense", 8)],
)
def test_a_quota_of_cgroups_v2_counts(eight: Path, text: str, count: int) -> None:
    (eight / "cpu.max").write_text(text + "\n")
    assert usable_processors() == count


@pytest.mark.parametrize(("quota", "count"), [(-1, 8), (200000, 2)])
def test_a_quota_of_cgroups_v1_counts(eight: Path, quota: int, count: int) -> None:
    (eight / "cpu").mkdir()
    (eight / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (eight / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert usable_processors() == count


def test_threads_are_as_many_as_the_quota_and_sleep(eight: Path) -> None:
    (eight / "cpu.max").write_text("200000 100000\n")
    told: dict[str, str] = {}
    choose_threads(told)
    assert told == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}


def test_what_the_user_has_set_is_left(eight: Path) -> None:
    (eight / "cpu.max").write_text("200000 100000\n")
    told = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "5"}
    choose_threads(told)
    assert told == {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "5"}


def test_without_a_quota_openmp_counts_by_itself(eight: Path) -> None:
    told: dict[str, str] = {}
    choose_threads(told)
    assert told == {"OMP_WAIT_POLICY": "PASSIVE"}


def test_a_command_that_may_use_one_processor_has_one_thread() -> None:
    """As under `taskset -c 0`: what a command finds when it imports torch."""
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from turbomind_quant.cli.commands import Commands; import click\n"
        "@click.group(cls=Commands)\ndef main(): pass\n"
        "@main.command()\ndef threads():\n    import torch; print(torch.get_num_threads(), os.environ['OMP_WAIT_POLICY'])\n"
        "main(['threads'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[3])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["1", "PASSIVE"], done.stderr
