"""Commands that start an engine keep unpacked models where TMQ_CACHE says, as those that quantize do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_gguf import write_gguf

ROOT = Path(__file__).resolve().parents[2]
SPEED = ("--batch", "1", "--input-len", "4", "--output-len", "2", "--device", "cpu")
COMMANDS = {
    "chat": ("chat", "MODEL", "--max-tokens", "2", "--device", "cpu"),
    "throughput": ("evaluate", "throughput", "MODEL", *SPEED),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_one_copy_in_the_named_cache(name: str, tmp_path: Path) -> None:
    model, home = tmp_path / "m.gguf", tmp_path / "home"
    write_gguf(model)
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "TMQ_CACHE": str(tmp_path / "wanted")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "other")
    arguments = [str(model) if part == "MODEL" else part for part in COMMANDS[name]]
    command = [sys.executable, "-m", "turbomind_quant", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input="ab", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    unpacked = [path.parent for path in tmp_path.rglob("model.safetensors.index.json")]
    assert len(unpacked) == 1 and unpacked[0].is_relative_to(tmp_path / "wanted")
