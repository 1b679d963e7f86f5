"""What tests of kernels share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def build_for_hopper(tmp_path: Path) -> Callable[..., str]:
    """Runs a script that compiles kernels, outside of the interpreter and of caches, and prints "compiled" last; all that it printed."""

    def build(source: str, **environment: str) -> str:
        kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        script = tmp_path / "build.py"
        script.write_text(source)
        done = subprocess.run(
            [sys.executable, str(script)],
            env=kept | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)} | environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0 and done.stdout.rstrip().endswith("compiled"), done.stderr[-3000:]
        return done.stdout + done.stderr

    return build
