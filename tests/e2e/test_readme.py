"""Every command and every Python block of the README, run as written: it must end well, or serve until it is stopped.

`my-model` is a tiny model, so that full default settings end in seconds: with the demo's tokenizer beside the demo's output for the
commands, with a tokenizer of bytes for the Python blocks.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from tiny_runs import write_runnable

from convert.readers import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
# Run by scripts/test.sh itself, and around these tests.
ELSEWHERE = ("bash scripts/demo.sh", "bash scripts/test.sh")
SERVERS = ("tmq serve", "tmq web")


def readme_blocks(language: str) -> list[str]:
    """The README's blocks in a language, in order."""
    page = (ROOT / "README.md").read_text(encoding="utf8")
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def readme_commands() -> list[str]:
    """The lines of the README's bash blocks, in order; a line that ends in a backslash goes on."""
    lines = "".join(readme_blocks("bash")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def tiny_model(folder: Path, tokenizer_dir: Path) -> None:
    import transformers

    for file in tokenizer_dir.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "model.safetensors.index.json":
            shutil.copy(file, folder / file.name)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder)


@pytest.fixture(scope="module")
def workplace(demo_out: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user would have it after the demo: demo-out and a model of their own."""
    place = tmp_path_factory.mktemp("readme")
    (place / "demo-out").symlink_to(demo_out)
    (place / "my-model").mkdir()
    tiny_model(place / "my-model", open_checkpoint(demo_model).tokenizer_dir)
    return place


def wait_until_up(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert process.poll() is None, "the server ended by itself"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).read()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"nothing answers on port {port}")


@pytest.mark.e2e
def test_every_command(workplace: Path) -> None:
    commands = readme_commands()
    assert len(commands) > 10
    environment = {**os.environ, "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    server: subprocess.Popen[bytes] | None = None
    try:
        for command in commands:
            if command in ELSEWHERE:
                continue
            command = command.replace(".venv/bin/", "")
            if command.startswith(SERVERS):
                stop(server)
                server = subprocess.Popen(shlex.split(command), cwd=workplace, env=environment)
                wait_until_up(23333 if command.startswith("tmq serve") else 6006, server)
                continue
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", command],
                cwd=workplace,
                env=environment,
                input="Hello, who are you?\n",
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    finally:
        stop(server)


def stop(server: subprocess.Popen[bytes] | None) -> None:
    if server is not None and server.poll() is None:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


@pytest.mark.e2e
def test_demo_table_of_the_readme_is_the_recorded_one() -> None:
    """Each perplexity of benchmarks/demo.json stands in the README's table."""
    recorded = json.loads((ROOT / "benchmarks" / "demo.json").read_text(encoding="utf8"))
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    for row in recorded["perplexity"]:
        assert f"{row['ppl']:.2f}" in readme, row


def test_every_python_block(tmp_path: Path) -> None:
    """One after the other in one folder, as a reader would run them."""
    tokenizer = write_runnable(tmp_path / "tokenizer")
    (tmp_path / "my-model").mkdir()
    tiny_model(tmp_path / "my-model", tokenizer)
    blocks = readme_blocks("python")
    assert blocks[0].startswith(
        'import turbomind_quant as tmq\n\ntmq.quantize("my-model", "my-model-4bit")\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMQ_CACHE": str(tmp_path / "cache")}
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=tmp_path,
            env=environment | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{block}\n{done.stderr[-4000:]}"
        names = [line.split()[0] for line in done.stdout.splitlines()[:2]]
        assert names == ["my-model", "my-model-4bit"]
    assert (tmp_path / "my-model-4bit" / "tmq" / "manifest.json").is_file()
