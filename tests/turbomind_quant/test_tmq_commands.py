"""The `tmq` command line: help, flags of LMDeploy, errors with their exit codes, doctor."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from live_server import live_server

import turbomind_quant.cli.tmq as commands
from convert.errors import InputError
from engine.config import EngineConfig
from engine.source import ModelSource
from serve.chat.client import HttpBackend, api_base
from serve.config import ServeConfig
from turbomind_quant.api.doctor import _numbers, examine

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, timeout_s: float = 60, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "turbomind_quant.cli.tmq", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, **kwargs)


@pytest.mark.parametrize("command", ["", "chat", "serve", "client", "web", "doctor"])
def test_help_is_quick_and_has_an_example(command: str) -> None:
    best = 9.0
    for _ in range(3):  # the bound is about our imports, not about what else the machine does
        start = time.monotonic()
        done = run(*filter(None, [command]), "--help")
        best = min(best, time.monotonic() - start)
    assert done.returncode == 0 and "Usage:" in done.stdout
    assert "tmq " in done.stdout
    assert best < 0.6  # 0.3 s on an idle machine


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, turbomind_quant.cli.tmq; "
        "print([m for m in ('torch','transformers','fastapi','gradio','httpx','uvicorn','pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_umbrella_has_the_other_commands() -> None:
    listed = run("--help").stdout
    for name in ("quantize", "evaluate", "chat", "client", "doctor", "serve", "web"):
        assert f"\n  {name} " in listed
    assert "awq" in run("quantize", "--help").stdout


ANSWERED = {
    "--api-keys": (["sk-1", "sk-2"], "--api-key-file"),
    "--chat-template": (["internlm2"], "chat_template.jinja"),
    "--quant-policy": (["4"], "8"),
}


@pytest.mark.parametrize("flag", ANSWERED)
def test_flags_of_lmdeploy_that_are_answered_with_what_to_use(flag: str) -> None:
    values, word = ANSWERED[flag]
    refused = invoke("serve", "/m", flag, *values)
    assert refused.exit_code == 2 and word in refused.output and flag in refused.output


def test_flags_of_lmdeploy_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop_here(source: Any, config: Any) -> Any:
        seen.append(config)
        raise InputError("stop here")

    monkeypatch.setattr("serve.local.open_model", stop_here)
    flags = [
        "--backend",
        "turbomind",
        "--model-format",
        "awq",
        "--max-batch-size",
        "16",
        "--log-level",
        "INFO",
    ]
    done = invoke("serve", "/m", "--port", "0", "--host", "127.0.0.1", *flags)
    assert done.exit_code == 3 and "stop here" in done.output
    assert "--backend turbomind changes nothing" in done.output and "--model-format awq" in done.output
    assert seen[0].max_batch == 16


LMDEPLOY_FLAGS = ["--server-name", "127.0.0.1", "--server-port", "23334", "--instance-num", "32", "--session-len", "1024",
                  "--cache-max-entry-count", "0.5", "--quant-policy", "8", "--tp", "1"]  # fmt: skip


@pytest.mark.parametrize("spelling", ["hyphens", "underscores"])
def test_flags_of_lmdeploy(monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    seen: dict[str, Any] = {}

    def stop_here(source: ModelSource, config: EngineConfig) -> Any:
        seen.update(source=source, config=config)
        raise InputError("enough seen")

    monkeypatch.setattr("serve.local.open_model", stop_here)
    flags = [f.replace("-", "_").replace("__", "--", 1) if f.startswith("--") else f for f in LMDEPLOY_FLAGS]
    result = CliRunner().invoke(
        commands.tmq, ["serve", "/m", *(flags if spelling == "underscores" else LMDEPLOY_FLAGS)]
    )
    assert result.exit_code == 3 and "enough seen" in result.output
    config = seen["config"]
    assert (config.max_batch, config.context_length, config.cache_fraction, config.kv_bits, config.tp) == (
        32,
        1024,
        0.5,
        8,
        1,
    )


@pytest.mark.parametrize("command", ["chat", "serve", "web"])
def test_flags_of_the_model_reach_the_engine(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    seen: dict[str, Any] = {}

    def stop_here(source: ModelSource, config: EngineConfig) -> Any:
        seen.update(source=source, config=config)
        raise InputError("enough seen")

    monkeypatch.setattr("serve.local.open_model", stop_here)
    flags = ["--trust-remote-code", "--family", "qwen2", "--device", "cpu", "--dtype", "bfloat16"]
    port = [] if command == "chat" else ["--server-port", "0"]
    assert "enough seen" in CliRunner().invoke(commands.tmq, [command, "/m", *port, *flags]).output
    assert seen["source"] == ModelSource("/m", family="qwen2", trust_remote_code=True)
    assert (seen["config"].device, seen["config"].dtype) == ("cpu", "bfloat16")
    assert seen["config"].max_batch == (1 if command == "chat" else EngineConfig.max_batch)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(commands.tmq, list(arguments))


def test_wrong_flags_are_usage_errors() -> None:
    assert invoke("serve", "/m", "--quant-policy", "4").exit_code == 2
    assert invoke("serve", "/m", "--server-port", "99999").exit_code == 2
    assert invoke("serve", "/m", "--allow-origin", "*").exit_code == 2
    assert invoke("serve").exit_code == 2
    page = invoke("web", "/m", "--server-name", "0.0.0.0")
    assert page.exit_code == 2 and "this machine only" in page.output


def test_a_page_of_servers_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the port is any free one and no model is loaded here."""
    pytest.importorskip("gradio")
    seen: dict[str, Any] = {}

    async def connect(url: str, key: str | None, model: str | None = None) -> str:
        return url

    def serve_page(backends: list[str], config: ServeConfig, listener: Any) -> int:
        seen.update(backends=backends, config=config, port=listener.getsockname()[1])
        return 0

    monkeypatch.setattr("serve.chat.client.HttpBackend.connect", connect)
    monkeypatch.setattr("serve.page.server.serve_page", serve_page)
    result = invoke("web", "http://127.0.0.1:1", "http://127.0.0.1:2", "--server-port", "0")
    assert result.exit_code == 0, result.output
    assert seen["backends"] == ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    assert seen["config"].server_port == seen["port"] > 0
    assert f"The page is at http://127.0.0.1:{seen['port']}" in result.output


def test_keys_are_not_taken_from_the_command_line(tmp_path: Path) -> None:
    assert invoke("serve", "/m", "--api-key", "x").exit_code == 2
    missing = invoke("serve", "/m", "--api-key-file", str(tmp_path / "none"))
    assert missing.exit_code == 3 and "cannot be read" in missing.output


def test_a_missing_model_is_bad_input(tmp_path: Path) -> None:
    done = run("chat", str(tmp_path / "none"), stdin=subprocess.DEVNULL)
    assert done.returncode == 3 and "Traceback" not in done.stderr


def test_client_answers_a_pipe() -> None:
    with live_server() as server:
        done = run("client", server.url, "--max-tokens", "5", input="hi")
        assert done.returncode == 0 and done.stdout.strip() == "world! 你好 🙂"
        assert run("client", server.url, "--model", "another", input="hi").returncode == 3
    gone = run("client", server.url, input="hi")
    assert gone.returncode == 4 and "tmq serve" in gone.stderr


def test_client_sends_its_key(tmp_path: Path) -> None:
    from serve.config import ServeConfig

    with live_server(config=ServeConfig(api_keys=("secret",))) as server:
        file = tmp_path / "key"
        file.write_text("secret\n")
        clean = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
        assert run("client", server.url, "--api-key-file", str(file), input="hi", env=clean).returncode == 0
        assert run("client", server.url, input="hi", env=clean | {"TMQ_API_KEY": "secret"}).returncode == 0
        refused = run("client", server.url, input="hi", env=clean)
        assert refused.returncode == 3 and "API key" in refused.stderr


@pytest.mark.parametrize(
    ("url", "base"),
    [("http://h:1", "http://h:1/v1"), ("h:1/v1/", "http://h:1/v1"), ("https://h/x", "https://h/x/v1")],
)
def test_addresses_of_servers(url: str, base: str) -> None:
    assert api_base(url) == base


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h",
        "",
        "file:///etc/passwd",
        "http://h:x",
        "http://h:99999",
        "h:0",
        "http://[::1",
        "http://h\x00",
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InputError):
        api_base(url)


def test_client_reports_the_error_of_the_server() -> None:
    import asyncio

    from serve.chat.settings import ChatSettings
    from serve.http.errors import ApiError

    async def ask(url: str) -> None:
        backend = await HttpBackend.connect(url)
        try:
            async for _ in backend.answer([{"role": "user", "content": "x" * 600}], ChatSettings()):
                pass
        finally:
            await backend.close()

    with live_server() as server, pytest.raises(ApiError, match="512"):
        asyncio.run(ask(server.url))


def test_doctor(tmp_path: Path) -> None:
    findings = {finding.subject: finding for finding in examine(tmp_path)}
    assert findings["torch"].status == "ok"
    assert findings["import name kernels"].status in ("ok", "warning")
    assert {"python", "transformers", "memory", "disk", "extra [serve]"} <= set(findings)
    assert all(finding.advice for finding in findings.values() if finding.status != "ok")
    done = run("doctor", "--json")
    assert done.returncode in (0, 4)
    assert {row["subject"] for row in json.loads(done.stdout)} >= {"torch", "disk"}


def test_doctor_explains_the_clash_of_names(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    other = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
         "from turbomind_quant.api.doctor import _kernels_clash; f = _kernels_clash(); print(f.status, f.advice)"],
        cwd="/", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert other.stdout.startswith("problem") and "pip uninstall kernels" in other.stdout, other.stderr


def test_versions_are_compared_by_number() -> None:
    assert _numbers("2.13.0+cpu") > _numbers("2.9") and _numbers("5.10") > _numbers("5.5")
