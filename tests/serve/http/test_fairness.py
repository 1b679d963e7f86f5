"""What one client may take from the others: places in the queue, conversations, memory for answers that it does not read."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, FakeTokenizer
from live_server import LiveServer, live_server, wait_until
from starlette.testclient import TestClient

from serve.config import ServeConfig
from serve.http.app import create_app
from serve.http.auth import KeyCheck, read_keys
from serve.http.errors import ApiError
from serve.limits import Limits

CHAT, TEXT, TURN = "/v1/chat/completions", "/v1/completions", "/v1/chat/interactive"
KEYS = ("alice", "bob")


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (ServeConfig(), 512),
        (ServeConfig(api_keys=("a",)), 512),
        (ServeConfig(api_keys=KEYS), 256),
        (ServeConfig("0.0.0.0"), 256),
        (ServeConfig(api_keys=KEYS, limits=Limits(pending=1)), 1),
        (ServeConfig(limits=Limits(pending_per_client=7)), 7),
        (ServeConfig(limits=Limits(pending=5, pending_per_client=7)), 5),
    ],
    ids=["this-machine", "one-key", "keys", "addresses", "one-place", "stated", "stated-above-all"],
)
def test_share_of_the_queue(config: ServeConfig, share: int) -> None:
    assert config.pending_per_client == share


def test_one_key_cannot_fill_the_queue_with_what_is_set_by_default() -> None:
    engine = FakeEngine()
    engine.hangs = True
    config = ServeConfig(api_keys=KEYS, limits=Limits(pending=16))
    with live_server(engine, config) as server:
        body = {"prompt": ["a"] * 4, "max_tokens": 100, "stream": True}
        streams = []
        with httpx.Client(timeout=60) as client:
            for _ in range(4):
                request = client.build_request("POST", server.url + TEXT, json=body, headers=key("alice"))
                streams.append(client.send(request, stream=True))
            assert [s.status_code for s in streams] == [200, 200, 429, 429]
            engine.hangs = False
            reply = client.post(server.url + TEXT, json={"prompt": "a"}, headers=key("bob"))
            assert reply.status_code == 200
            for stream in streams:
                stream.close()
        server.wait_idle()


def test_the_engine_is_told_whose_request_it_is(engine: FakeEngine) -> None:
    app = create_app(engine, FakeTokenizer(), ServeConfig(api_keys=KEYS))
    with TestClient(app, base_url="http://127.0.0.1:23333") as api:
        for name in ("alice", "bob", "alice"):
            assert api.post(TEXT, json={"prompt": "x"}, headers=key(name)).status_code == 200
    first, second, third = (request.client for request in engine.requests)
    assert first == third != second and first and second


@pytest.fixture
def keyed(engine: FakeEngine) -> Iterator[TestClient]:
    limits = Limits(sessions=10, sessions_per_client=4)
    app = create_app(engine, FakeTokenizer(), ServeConfig(api_keys=("alice", "bob", "carol"), limits=limits))
    with TestClient(app, base_url="http://127.0.0.1:23333") as api:
        yield api


def turn(api: TestClient, name: str, session: int, **fields: Any) -> httpx.Response:
    body = {
        "prompt": "hi",
        "session_id": session,
        "interactive_mode": True,
        "request_output_len": 1,
        **fields,
    }
    return api.post(TURN, json=body, headers=key(name))


def test_sessions_of_one_id_are_those_of_each_client(keyed: TestClient) -> None:
    """The same session id under two keys: neither sees the other's words, nor ends or cancels the other's turn."""
    alice = turn(keyed, "alice", 1, prompt="my name is Ada").json()
    bob = turn(keyed, "bob", 1).json()
    assert (alice["history_tokens"], bob["history_tokens"]) == (0, 0)
    before = turn(keyed, "alice", 1).json()["history_tokens"]
    assert before > 0
    turn(keyed, "bob", 1, prompt="", request_output_len=0)  # bob ends his own
    assert turn(keyed, "alice", 1).json()["history_tokens"] > before
    assert turn(keyed, "bob", 1).json()["history_tokens"] == 0


def test_a_client_with_many_sessions_loses_its_own(keyed: TestClient) -> None:
    turn(keyed, "alice", 1)
    history = turn(keyed, "alice", 1).json()["history_tokens"]
    for session in range(1, 31):
        assert turn(keyed, "bob", session).status_code == 200
    assert turn(keyed, "alice", 1).json()["history_tokens"] > history
    lost = turn(keyed, "bob", 1)
    assert lost.status_code == 404 and lost.json()["error"]["code"] == "session_gone"
    assert turn(keyed, "bob", 30).json()["history_tokens"] > 0


def test_the_client_with_the_most_gives_way_where_all_places_are_taken(keyed: TestClient) -> None:
    for name, sessions in (("bob", 4), ("carol", 4), ("alice", 2)):
        for session in range(sessions):
            turn(keyed, name, session)
    assert turn(keyed, "alice", 2).status_code == 200  # the eleventh
    assert turn(keyed, "alice", 0).status_code == 200
    assert sorted(turn(keyed, name, 0).status_code for name in ("bob", "carol")) == [200, 404]


def test_a_busy_session_is_answered_409_and_stays_as_it_was() -> None:
    engine = FakeEngine()
    with live_server(engine) as server:
        body = {"prompt": "hi", "session_id": 5, "interactive_mode": True, "request_output_len": 3}
        assert httpx.post(server.url + TURN, json=body, timeout=60).status_code == 200
        engine.hangs = True
        with httpx.stream("POST", server.url + TURN, json={**body, "stream": True}, timeout=60) as first:
            wait_until(lambda: bool(engine.live))
            second = httpx.post(server.url + TURN, json=body, timeout=60)
            assert second.status_code == 409 and second.json()["error"]["code"] == "session_busy"
            assert len(engine.requests) == 2, "the second turn must not reach the engine"
            other = httpx.post(server.url + TURN, json={**body, "session_id": 6, "cancel": True}, timeout=60)
            assert other.status_code == 200  # nothing to cancel there
            engine.hangs = False
            lines = [json.loads(line) for line in first.iter_lines()]
        assert lines[-1]["finish_reason"] == "length"
        third = httpx.post(server.url + TURN, json=body, timeout=60).json()
        assert third["history_tokens"] == lines[-1]["history_tokens"] + lines[-1]["input_tokens"] + 3


@pytest.mark.parametrize(
    "name", ["voilà", "Pà", "å", "naïve\u00a0", "Å\u0085x", "schön\u2028", "\u3000x", "à" * 40]
)
def test_keys_of_any_letters_are_accepted(tmp_path: Path, name: str) -> None:
    """The bytes of a header are read as Latin-1, where the last byte of a letter may look like a blank."""
    file = tmp_path / "keys"
    file.write_text(f"# ours\n  {name} \r\nother\n", encoding="utf-8")
    keys = read_keys(file)
    assert keys == (name, "other")
    check = KeyCheck(keys)
    assert check.client("Bearer  " + name.encode().decode("latin-1") + " ") == "key-0"
    with pytest.raises(ApiError):
        check.client("Bearer " + name.encode()[:-1].decode("latin-1"))


def never_reading(server: LiveServer, body: dict[str, Any]) -> socket.socket:
    """Ask for a stream on a connection whose answer stays unread."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    raw = json.dumps(body).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


LONG = {"prompt": ["a"] * 16, "max_tokens": 3000, "stream": True, "logprobs": 20}


def idle(server: LiveServer) -> Callable[[], bool]:
    return lambda: not server.engine.live and server.service.admission.pending == 0


def test_places_are_free_once_the_engine_has_finished_whoever_reads() -> None:
    engine = FakeEngine(context_length=100_000)
    limits = Limits(pending=16, stall_s=1000, unread=10**9, unread_in_all=10**9)
    with live_server(engine, ServeConfig(limits=limits)) as server, never_reading(server, LONG):
        wait_until(lambda: len(engine.requests) == 16)
        wait_until(idle(server))
        assert server.service.runs.count == 1  # its answer still waits for its reader
        assert httpx.post(server.url + TEXT, json={"prompt": "a"}, timeout=60).status_code == 200


@pytest.mark.parametrize(
    "limits",
    [
        Limits(stall_s=0.5, unread=10**9, unread_in_all=10**9),
        Limits(stall_s=1000, unread=20_000, unread_in_all=10**9),
        Limits(stall_s=1000, unread=10**9, unread_in_all=20_000),
    ],
    ids=["time", "tokens", "tokens-of-all"],
)
def test_a_client_that_does_not_read_is_given_up(limits: Limits) -> None:
    engine = FakeEngine(delay_s=0.001, context_length=100_000)
    with live_server(engine, ServeConfig(limits=limits)) as server, never_reading(server, LONG) as slow:
        wait_until(lambda: len(engine.requests) == 16)
        wait_until(idle(server))
        wait_until(lambda: server.service.runs.count == 0)
        assert server.service.runs.unread == 0
        slow.settimeout(60)
        answer = b""
        with suppress(ConnectionResetError):
            while part := slow.recv(1 << 20):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200") and b"[DONE]" not in answer  # closed before it was whole


def test_a_reader_that_keeps_up_gets_all_of_it() -> None:
    engine = FakeEngine(context_length=100_000)
    limits = Limits(stall_s=0.5, unread=20_000, unread_in_all=20_000)
    with live_server(engine, ServeConfig(limits=limits)) as server:
        body = {"prompt": "a", "max_tokens": 5000, "logprobs": 20}
        reply = httpx.post(server.url + TEXT, json=body, timeout=60)
        assert reply.json()["usage"]["completion_tokens"] == 5000
        assert server.service.runs.unread == 0
        server.wait_idle()
