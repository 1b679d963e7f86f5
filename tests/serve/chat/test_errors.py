"""What `tmq chat` and `tmq client` say, and with which exit code, where a piped message gets no whole answer."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_engine import FakeEngine, FakeTokenizer
from live_server import live_server

import turbomind_quant.cli.tmq as commands
from engine.api import EngineDied
from serve.chat.backends import EngineBackend
from serve.chat.settings import ChatSettings
from serve.http.errors import ApiError

MODELS = (200, json.dumps({"data": [{"id": "m"}]}).encode())


def ask(*arguments: str, text: str | bytes = "hi") -> Result:
    return CliRunner().invoke(commands.tmq, list(arguments), input=text)


def assert_only(result: Result, code: int, *parts: str) -> None:
    """One sentence on stderr and the exit code; nothing of the program's own types, no blame on the program."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("Loading ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in parts:
        assert part in lines[0]
    assert "ApiError" not in lines[0] and "fault of the program" not in lines[0]


@dataclass
class _Model:
    engine: FakeEngine
    tokenizer: FakeTokenizer
    name: str = "fake"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The engine that `tmq chat` opens, whatever the path."""
    engine = FakeEngine()
    monkeypatch.setattr("serve.local.open_model", lambda *_: nullcontext(_Model(engine, FakeTokenizer())))
    return engine


@contextmanager
def answering(answer: tuple[int, bytes], models: tuple[int, bytes] = MODELS) -> Iterator[str]:
    """A server of another make: one answer to GET, one to POST. Its connections close behind the answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*models)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._send(*answer)

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_prompt_beyond_the_context_is_bad_input(engine: FakeEngine) -> None:
    said = "The model's context is 512 tokens"
    assert_only(ask("chat", "/m", text="x" * 600), 3, f"error: {said}", "Shorten the prompt")
    with live_server() as server:
        assert_only(ask("client", server.url, text="x" * 600), 3, f"error: {said}")
    assert engine.requests == []


def test_more_tokens_than_the_context_leaves_are_refused_alike(engine: FakeEngine) -> None:
    flags = ("--max-tokens", "1000000")
    here = ask("chat", "/m", *flags)
    assert_only(here, 3, "1000000 tokens of answer were asked for", "lower max_tokens")
    with live_server() as server:
        there = ask("client", server.url, *flags)
    assert_only(there, 3)
    assert here.stderr.endswith(there.stderr)
    assert engine.requests == []
    for command in ("chat", "client"):
        assert "more than the context leaves is refused" in " ".join(ask(command, "--help").stdout.split())


def test_a_page_cuts_max_tokens_to_what_is_left() -> None:
    """The slider of `tmq web` says "at most"; `tmq chat` refuses."""
    engine = FakeEngine()

    async def tokens(clip: bool) -> int:
        backend = EngineBackend(engine, FakeTokenizer(), "fake", clip)
        said = [{"role": "user", "content": "hi"}]
        return [p.completion_tokens async for p in backend.answer(said, ChatSettings(max_tokens=4096))][-1]

    assert asyncio.run(tokens(True)) == 512 - 10
    with pytest.raises(ApiError, match="4096 tokens"):
        asyncio.run(tokens(False))


def test_an_engine_that_fails_is_a_lack_of_resources(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.fails.add("10")  # "user\nhi" with its three control tokens
    assert_only(ask("chat", "/m"), 4, "The step of this request failed.")
    engine.fails.clear()

    def dies(_: object) -> str:
        raise EngineDied("killed by a test")

    monkeypatch.setattr(engine, "submit", dies)
    assert_only(ask("chat", "/m"), 4, "The engine has stopped.")


@pytest.mark.parametrize(
    ("status", "code"), [(400, 3), (401, 3), (403, 3), (404, 3), (422, 3), (429, 4), (500, 4), (503, 4)]
)
def test_codes_of_refusals(status: int, code: int) -> None:
    body = json.dumps({"error": {"message": "This is why."}}).encode()
    with answering((status, body)) as url:
        result = ask("client", url)
        assert_only(result, code)
        assert result.stderr == "error: This is why.\n" and result.stdout == ""
    with answering((200, b""), models=(status, body)) as url:
        assert_only(ask("client", url), code, f"answers {status}: This is why.")


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines"])
def test_a_key_that_no_header_carries(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMQ_API_KEY", key)
    result = ask("client", "http://127.0.0.1:1")
    assert_only(result, 3, "API key")
    assert key not in result.stderr


@pytest.mark.parametrize("body", [b"<html>Bad gateway</html>", b"", b'{"error": {"message": null}}', b"[]"])
def test_refusals_of_another_shape_name_their_status(body: bytes) -> None:
    with answering((502, body)) as url:
        assert_only(ask("client", url), 4, "The server answers 502: ")


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (b"", "The connection ended inside the answer."),
        (b'data: {"error": {"message": "The server is ending."}}\n\n', "The server is ending."),
        (b"data: {broken\n\n", "no answer of an OpenAI-compatible server"),
        (b"data: 7\n\n", "no answer of an OpenAI-compatible server"),
    ],
)
def test_a_server_that_fails_inside_an_answer(rest: bytes, said: str) -> None:
    chunk = b'data: {"choices": [{"index": 0, "delta": {"content": "Once"}, "finish_reason": null}]}\n\n'
    with answering((200, chunk + rest)) as url:
        result = ask("client", url)
        assert_only(result, 4, said)
        assert result.stdout == "Once\n"  # what had come, on a line of its own


def test_bytes_that_are_no_text_do_no_harm(engine: FakeEngine) -> None:
    cut = "世界".encode()[:-1]
    result = ask("chat", "/m", "--max-tokens", "3", text=cut)
    assert result.exit_code == 0, result.output
    expected = FakeTokenizer().apply_chat_template([{"role": "user", "content": "世\ufffd"}])
    assert engine.requests[0].prompt_ids == tuple(expected)


STRICT = [
    (
        422,
        b'{"object": "error", "message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "stream_options"]}]}}',
    ),
    (400, b'{"error": {"message": "Unrecognized request argument supplied: stream_options"}}'),
    (400, b'{"detail": "Extra inputs are not permitted"}'),
]
DONE = b'data: {"choices": [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("refusal", STRICT, ids=["mistral", "azure", "pydantic"])
def test_a_server_that_knows_no_stream_options_is_asked_without_them(refusal: tuple[int, bytes]) -> None:
    asked: list[bool] = []

    class Strict(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*MODELS)

        def do_POST(self) -> None:
            asked.append(b"stream_options" in self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*(refusal if asked[-1] else (200, DONE)))

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Strict) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        result = ask("client", f"http://127.0.0.1:{server.server_port}", text="one\ntwo")
        server.shutdown()
    assert result.exit_code == 0 and "Hello" in result.stdout, result.output
    assert asked[:2] == [True, False] and not any(asked[2:])  # the server is asked once


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_that_lists_no_models_is_asked_for_the_named_one(status: int) -> None:
    with answering((200, DONE), models=(status, b"nothing here")) as url:
        assert_only(ask("client", url), 3 if status < 500 else 4, "Name its model with --model.")
        result = ask("client", url, "--model", "mine")
    assert result.exit_code == 0 and "Hello" in result.stdout, result.output
