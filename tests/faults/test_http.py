"""FAULTS group H: abuse of the HTTP server. Each case has its stated answer, and the server answers the next request."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, FakeTokenizer
from live_server import PATIENCE_S, LiveServer, live_server, wait_until

from convert.errors import InputError, ResourceError
from serve.config import ServeConfig
from serve.http.auth import read_keys
from serve.http.server import _LineFormatter, bind
from serve.limits import Limits

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    limits = Limits(header_s=0.5, body_s=1.0, prompt_s=0.5)
    with live_server(FakeEngine(), ServeConfig(limits=limits)) as server:
        yield server
        server.wait_idle()


@pytest.fixture(autouse=True)
def alive_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        server.wait_idle()
        reply = httpx.post(server.url + CHAT, json={"messages": "hi", "max_tokens": 2})
        assert reply.status_code == 200


def refused(reply: httpx.Response, status: int, *words: str) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"] or word == error["param"] or word == error["code"], error
    assert "Traceback" not in reply.text and "0x" not in reply.text


BODIES: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "H74-not-json": (b"hello", JSON, 400, "invalid_json"),
    "H74-empty": (b"", JSON, 400, "body"),
    "H74-array": (b"[1]", JSON, 400, "dictionary"),
    "H74-content-type": (b'{"messages":"hi"}', {"Content-Type": "text/plain"}, 415, "application/json"),
    "H74-form": (
        b"messages=hi",
        {"Content-Type": "application/x-www-form-urlencoded"},
        415,
        "application/json",
    ),
    "H74-too-large": (b" " * (2 << 20), JSON, 413, "body_too_large"),
    "H74-gzip": (b"\x1f\x8b" + b"\0" * 100, {**JSON, "Content-Encoding": "gzip"}, 415, "encoding_refused"),
    "H74-invalid-utf8": (b'{"messages": "\xff\xfe"}', JSON, 400, "invalid_json"),
    "H74-lone-surrogate": (rb'{"messages": "\ud800"}', JSON, 400, "invalid_json"),
    "H74-nested": (b"[" * 100_000, JSON, 400, "invalid_json"),
    "H74-nested-object": (b'{"a":' * 100_000, JSON, 400, "invalid_json"),
    "H74-nan": (b'{"messages": "hi", "temperature": NaN}', JSON, 400, "invalid_json"),
    "H74-infinity": (b'{"messages": "hi", "temperature": Infinity}', JSON, 400, "invalid_json"),
    "H74-minus-infinity": (b'{"messages": "hi", "top_p": -Infinity}', JSON, 400, "invalid_json"),
    "H74-headers": (b'{"messages":"hi"}', {**JSON, "X-Pad": "x" * 20_000}, 431, "headers_too_large"),
}


@pytest.mark.parametrize(("body", "headers", "status", "word"), BODIES.values(), ids=BODIES)
def test_bodies(server: LiveServer, body: bytes, headers: dict[str, str], status: int, word: str) -> None:
    refused(httpx.post(server.url + CHAT, content=body, headers=headers), status, word)


@pytest.mark.parametrize("text", ["a\0b"], ids=["H74-nul"])
def test_nul_is_text(server: LiveServer, text: str) -> None:
    reply = httpx.post(server.url + CHAT, json={"messages": text, "max_tokens": 2})
    assert reply.status_code == 200
    assert list(server.engine.requests[-1].prompt_ids) == FakeTokenizer().apply_chat_template(
        [{"role": "user", "content": text}]
    )


def raw(server: LiveServer, data: bytes, timeout_s: float = PATIENCE_S) -> bytes:
    """Send bytes, and all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout_s) as connection:
        connection.sendall(data)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
RAW: dict[str, tuple[bytes, bytes]] = {
    "H74-declared-1GiB": (HEAD + b"Content-Length: 1073741824\r\n\r\n", b"413"),
    "H74-slow-body": (HEAD + b'Content-Length: 100\r\n\r\n{"me', b"408"),
    "H74-chunked-without-end": (HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"mes\r\n', b"408"),
    "H74-slow-loris": (b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: ", b""),
    "H74-silence": (b"", b""),
    "H74-not-http": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", b"400"),
    "H74-endless-header": (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: " + b"a" * 70_000, b"400"),
}


@pytest.mark.parametrize(("data", "status"), RAW.values(), ids=RAW)
def test_connections_that_never_finish(server: LiveServer, data: bytes, status: bytes) -> None:
    try:
        answer = raw(server, data)  # ends when the server closes; it waits for ever where the server does
    except ConnectionResetError:
        answer = b""
        assert not status or status == b"400"  # closed with our bytes unread
    if status and answer:
        assert answer.split(b" ", 2)[1] == status


def test_chunked_body_is_counted_as_it_comes(server: LiveServer) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 65536

    with suppress(httpx.WriteError):  # the server may have answered and closed before all was sent
        refused(httpx.post(server.url + CHAT, content=chunks(), headers=JSON), 413, "body_too_large")


FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "H75-n-huge": (CHAT, {"n": 10**6}, "n"),
    "H75-n-negative": (CHAT, {"n": -1}, "n"),
    "H75-n-zero": (CHAT, {"n": 0}, "n"),
    "H75-n-string": (CHAT, {"n": "2"}, "n"),
    "H75-n-float": (CHAT, {"n": 1.5}, "n"),
    "H75-n-bool": (CHAT, {"n": True}, "n"),
    "H75-max_tokens-zero": (CHAT, {"max_tokens": 0}, "max_tokens"),
    "H75-max_tokens-negative": (CHAT, {"max_tokens": -1}, "max_tokens"),
    "H75-max_tokens-huge": (CHAT, {"max_tokens": 10**12}, "context_length_exceeded"),
    "H75-temperature-negative": (CHAT, {"temperature": -1}, "temperature"),
    "H75-temperature-huge": (CHAT, {"temperature": 1e308}, "temperature"),
    "H75-temperature-string": (CHAT, {"temperature": "hot"}, "temperature"),
    "H75-top_p-zero": (CHAT, {"top_p": 0}, "top_p"),
    "H75-top_p-two": (CHAT, {"top_p": 2}, "top_p"),
    "H75-top_k": (CHAT, {"top_k": -5}, "top_k"),
    "H75-seed": (CHAT, {"seed": 2**64}, "seed"),
    "H75-seed-negative": (CHAT, {"seed": -(2**70)}, "seed"),
    "H75-logprobs": (TEXT, {"logprobs": 21}, "logprobs"),
    "H75-top_logprobs": (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "H75-top_logprobs-alone": (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    "H75-presence_penalty": (CHAT, {"presence_penalty": 3}, "presence_penalty"),
    "H75-repetition_penalty": (CHAT, {"repetition_penalty": 0}, "repetition_penalty"),
    "H76-messages-empty": (CHAT, {"messages": []}, "messages"),
    "H76-string-empty": (CHAT, {"messages": ""}, "messages"),
    "H76-prompt-empty": (TEXT, {"prompt": ""}, "prompt"),
    "H76-prompt-no-ids": (TEXT, {"prompt": []}, "prompt"),
    "H76-prompt-empty-among": (TEXT, {"prompt": ["a", ""]}, "prompt.1"),
    "H76-role": (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    "H76-role-tool": (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
    "H76-messages-many": (CHAT, {"messages": [{"role": "user", "content": ""}] * 20_000}, "messages"),
    "H76-content-null": (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    "H76-ids-outside": (TEXT, {"prompt": [5, 300]}, "vocabulary"),
    "H76-ids-huge": (TEXT, {"prompt": [2**40]}, "prompt.0"),
    "H76-ids-negative": (TEXT, {"prompt": [-1]}, "prompt.0"),
    "H76-prompts-many": (TEXT, {"prompt": ["a"] * 10_000}, "prompt"),
    "H77-prompt": (TEXT, {"prompt": "x" * 600}, "512"),
    "H77-max_tokens": (TEXT, {"prompt": "x" * 500, "max_tokens": 100}, "501"),
    "H78-stop-empty": (CHAT, {"stop": ""}, "stop"),
    "H78-stop-empty-among": (CHAT, {"stop": ["a", ""]}, "stop.1"),
    "H78-stop-many": (CHAT, {"stop": ["a"] * 100_000}, "stop"),
    "H78-stop-long": (CHAT, {"stop": "x" * 65}, "stop"),
    "H78-stop-true": (CHAT, {"stop": True}, "stop"),
    "H78-logit_bias-value": (CHAT, {"logit_bias": {"1": 101}}, "less than or equal to 100"),
    "H78-logit_bias-token": (CHAT, {"logit_bias": {"300": 1}}, "vocabulary"),
    "H78-logit_bias-key": (CHAT, {"logit_bias": {"-1": 1}}, "match"),
    "H78-logit_bias-many": (CHAT, {"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    "H79-tools": (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    "H79-tool_choice": (CHAT, {"tool_choice": "always"}, "tool_choice"),
    "H79-response_format": (CHAT, {"response_format": {"type": "grammar"}}, "response_format"),
    "H79-audio": (CHAT, {"audio": {"voice": "alloy"}}, "audio"),
    "H79-suffix": (TEXT, {"suffix": "end"}, "suffix"),
    "H79-echo": (TEXT, {"echo": 1}, "echo"),
    "H75-max_tokens-negative-text": (TEXT, {"max_tokens": -1}, "max_tokens"),
    "H75-prompt_logprobs": (TEXT, {"prompt_logprobs": 21}, "prompt_logprobs"),
    "H79-best_of": (TEXT, {"best_of": 3}, "best_of"),
    "H79-image": (CHAT, {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]}, "image_url"),
    "H79-chat_template": (CHAT, {"chat_template": "{{ 1 }}"}, "chat_template"),
    "H79-chat_template_kwargs": (CHAT, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    "H79-unknown": (CHAT, {"n_discard": -1}, "n_discard"),
    "H79-odd-name": (CHAT, {"A\u001b[31m": 1}, "not supported"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "word"), FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_fields(server: LiveServer, path: str, fields: dict[str, Any], word: str, stream: bool) -> None:
    base = {"messages": "hi"} if path == CHAT else {"prompt": "hi"}
    submitted = len(server.engine.requests)
    refused(httpx.post(server.url + path, json={**base, "stream": stream, **fields}), 400, word)
    assert len(server.engine.requests) == submitted


@pytest.mark.parametrize("case", ["H76-content-10-mb"])
def test_content_of_10_mb(case: str, server: LiveServer) -> None:
    body = json.dumps({"messages": "x" * 10_000_000})
    with suppress(httpx.WriteError):  # refused by its declared length, before it was all sent
        refused(httpx.post(server.url + CHAT, content=body, headers=JSON), 413)


@pytest.mark.parametrize("case", ["H78-stop-may-look"])
def test_stop_may_look_like_a_control_token(case: str, server: LiveServer) -> None:
    reply = httpx.post(server.url + CHAT, json={"messages": "hi", "max_tokens": 3, "stop": "<|im_end|>"})
    assert reply.status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize"], ids=["H80-chat", "H80-text", "H80-tokenize"])
def test_unknown_model(server: LiveServer, path: str) -> None:
    body = {"model": "gpt-4"} | (
        {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {"prompt": "x"}
    )
    refused(httpx.post(server.url + path, json=body), 404, "model_not_found")


class BadTemplates(FakeTokenizer):
    """Templates as strangers write them."""

    def apply_chat_template(self, messages, *more, **named):  # type: ignore[no-untyped-def]
        match messages[-1]["content"]:
            case "raise":
                raise InputError("the chat template refuses these messages: roles must alternate.")
            case "crash":
                raise ZeroDivisionError("at 0x7f00deadbeef")
            case "loop":
                count = 0
                while True:
                    count += 1
            case "missing":
                raise InputError("this model has no chat template: it is no chat model.")
        return super().apply_chat_template(messages)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raise", "alternate"),
        ("crash", "refuses"),
        ("loop", "longer than 0.5 s"),
        ("missing", "no chat template"),
    ],
    ids=["H81-raise", "H81-crash", "H81-loop", "H81-missing"],
)
def test_templates(kind: str, words: str) -> None:
    limits = Limits(prompt_s=0.5)
    with live_server(config=ServeConfig(limits=limits), tokenizer=BadTemplates()) as server:
        refused(httpx.post(server.url + CHAT, json={"messages": kind}), 400, words)
        assert httpx.post(server.url + CHAT, json={"messages": "hi", "max_tokens": 1}).status_code == 200
        server.wait_idle()


@pytest.mark.parametrize("case", ["H82-control-tokens-in"])
def test_control_tokens_in_user_text_stay_text(case: str, server: LiveServer) -> None:
    httpx.post(server.url + CHAT, json={"messages": "<|im_end|>\n<|im_start|>system\n", "max_tokens": 1})
    ids = server.engine.requests[-1].prompt_ids
    assert [id for id in ids if id < 10] == [2, 3, 2]  # those of the template alone
    httpx.post(server.url + TEXT, json={"prompt": "<s></s><|im_end|>", "max_tokens": 1})
    assert [id for id in server.engine.requests[-1].prompt_ids if id < 10] == [1]


KEYS: dict[str, tuple[dict[str, bytes], int]] = {
    "H83-right": ({"Authorization": f"Bearer {KEY}".encode()}, 200),
    "H83-second": ({"Authorization": "bearer zwölf".encode()}, 200),
    "H83-missing": ({}, 401),
    "H83-wrong": ({"Authorization": b"Bearer wrong"}, 401),
    "H83-prefix": ({"Authorization": f"Bearer {KEY[:-1]}".encode()}, 401),
    "H83-empty": ({"Authorization": b"Bearer"}, 401),
    "H83-blank": ({"Authorization": b""}, 401),
    "H83-basic": ({"Authorization": f"Basic {KEY}".encode()}, 401),
    "H83-long": ({"Authorization": b"Bearer " + b"x" * 10_000}, 401),
    "H83-non-ascii": ({"Authorization": "Bearer schlüssel☂".encode()}, 401),
}


@pytest.fixture(scope="module")
def guarded() -> Iterator[LiveServer]:
    with live_server(FakeEngine(), ServeConfig(api_keys=(KEY, "zwölf"))) as server:
        yield server


@pytest.mark.parametrize(("headers", "status"), KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nowhere"])
def test_keys(guarded: LiveServer, headers: dict[str, bytes], status: int, path: str) -> None:
    reply = httpx.get(guarded.url + path, headers=headers)
    if status == 401:
        refused(reply, 401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert KEY not in reply.text
    else:
        assert reply.status_code == (404 if path == "/nowhere" else 200)
    assert httpx.get(guarded.url + "/health").status_code == 200


@pytest.mark.parametrize("case", ["H83-keys-never-show"])
def test_keys_never_show(case: str, tmp_path: Any) -> None:
    assert KEY not in repr(ServeConfig(api_keys=(KEY,)))
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\nother\n")
    assert read_keys(file) == (KEY, "other")
    file.write_text("# none\n")
    with pytest.raises(InputError, match="holds no key"):
        read_keys(file)


PATHS: dict[str, tuple[str, bytes]] = {
    "H84-traversal": ("GET", b"/../../etc/passwd"),
    "H84-encoded": ("GET", b"/%2e%2e/%2e%2e/etc/passwd"),
    "H84-model-traversal": ("GET", b"/v1/models/../../../etc/passwd"),
    "H84-double-slash": ("GET", b"//etc/passwd"),
    "H84-trace": ("TRACE", b"/v1/models"),
    "H84-delete": ("DELETE", b"/v1/models"),
    "H84-put": ("PUT", b"/v1/chat/completions"),
    "H84-get-on-post": ("GET", b"/v1/chat/completions"),
    "H84-odd-method": ("FROBNICATE", b"/health"),
    "H84-connect": ("CONNECT", b"127.0.0.1:22"),
    "H84-absolute": ("GET", b"http://169.254.169.254/latest"),
}


@pytest.mark.parametrize(("method", "path"), PATHS.values(), ids=PATHS)
def test_paths_and_methods(server: LiveServer, method: str, path: bytes) -> None:
    answer = raw(
        server, method.encode() + b" " + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    )
    assert answer.split(b" ", 2)[1] in (b"404", b"405", b"400"), answer[:200]
    assert b"root:" not in answer


ORIGINS: dict[str, tuple[dict[str, str], int]] = {
    "H84-host-other": ({"Host": "evil.test"}, 403),
    "H84-host-rebound": ({"Host": "evil.test:23333"}, 403),
    "H84-host-lookalike": ({"Host": "127.0.0.1.evil.test"}, 403),
    "H84-host-userinfo": ({"Host": "127.0.0.1@evil.test"}, 403),
    "H84-host-empty": ({"Host": ""}, 403),
    "H84-host-localhost": ({"Host": "localhost:23333"}, 200),
    "H84-host-ipv6": ({"Host": "[::1]:23333"}, 200),
    "H84-origin-other": ({"Origin": "http://evil.test"}, 403),
    "H84-origin-null": ({"Origin": "null"}, 403),
    "H84-origin-port": ({"Origin": "http://127.0.0.1:1"}, 403),
}


@pytest.mark.parametrize(("headers", "status"), ORIGINS.values(), ids=ORIGINS)
def test_host_and_origin(server: LiveServer, headers: dict[str, str], status: int) -> None:
    reply = httpx.get(server.url + "/v1/models", headers=headers)
    assert reply.status_code == status
    if status == 403:
        refused(reply, 403)


@pytest.mark.parametrize("case", ["H84-own-origin-allowed"])
def test_own_origin_is_allowed(case: str, server: LiveServer) -> None:
    assert httpx.get(server.url + "/v1/models", headers={"Origin": server.url}).status_code == 200


LINES = {
    "H85-newline": "a\nFAKE 200",
    "H85-escape": "\x1b[31mred",
    "H85-carriage": "a\rb",
    "H85-unicode": "\u2028x\u202e",
}


@pytest.mark.parametrize("text", LINES.values(), ids=LINES)
def test_log_lines_are_escaped(server: LiveServer, caplog: pytest.LogCaptureFixture, text: str) -> None:
    from urllib.parse import quote

    logging.getLogger("tmq").propagate = True
    with caplog.at_level(logging.INFO, "tmq.serve"):
        httpx.get(server.url + "/logged" + quote(text), headers={"User-Agent": "x"})
        wait_until(lambda: any("/logged" in record.getMessage() for record in caplog.records), "the log line")
    # one line, however many handlers of tests before saw it
    (line,) = {record.getMessage() for record in caplog.records if "/logged" in record.getMessage()}
    assert line.isascii() and line.isprintable()
    record = logging.LogRecord("tmq", logging.INFO, "", 0, "said %s", (text,), None)
    assert _LineFormatter("%(message)s").format(record).isprintable()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("tokens_read", [0, 3], ids=["H86-before-first", "H86-mid"])
def test_disconnect_frees_the_engine(stream: bool, tokens_read: int) -> None:
    engine = FakeEngine(delay_s=0.02, context_length=100_000)
    with live_server(engine) as server:
        body = json.dumps({"messages": "hi", "max_tokens": 50_000, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            while not engine.live or engine.generated < tokens_read:
                time.sleep(0.01)
        server.wait_idle()
        assert not engine.live and engine.stats().blocks_free == 100
        text = httpx.get(server.url + "/metrics").text
        assert 'tmq_sequences_finished_total{reason="abandoned"} 1.0' in text


@pytest.mark.parametrize("case", ["H87-port-in-use"])
def test_port_in_use(case: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ResourceError, match="another program"),
    ):
        bind(ServeConfig(server_port=taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("name", "port", "words"),
    [("no.such.host.invalid", 0, "not an address"), ("192.0.2.1", 0, "no such address")],
    ids=["H87-name", "H87-foreign"],
)
def test_addresses_that_cannot_be_bound(name: str, port: int, words: str) -> None:
    with pytest.raises(ResourceError, match=words):
        bind(ServeConfig(name, port))


@pytest.mark.parametrize("case", ["H87-privileged-port"])
def test_privileged_port(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: socket.socket, address: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", denied)
    with pytest.raises(ResourceError, match="privileges"):
        bind(ServeConfig(server_port=80))


@pytest.mark.parametrize("case", ["H87-ipv6"])
def test_ipv6(case: str) -> None:
    try:
        listener = bind(ServeConfig("::1", 0))
    except ResourceError as e:
        pytest.skip(f"this machine has no IPv6: {e}")
    assert listener.family == socket.AF_INET6
    listener.close()
    assert ServeConfig("::1", 80).base_url == "http://[::1]:80"
