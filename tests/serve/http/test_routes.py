"""What the routes answer beyond OpenAI's client: LMDeploy's requests, sessions, tokens, health, metrics, the page."""

import json
import re
from typing import Any

import pytest
from fake_engine import FakeEngine, FakeTokenizer
from starlette.testclient import TestClient

from serve.config import ServeConfig
from serve.http.app import create_app
from serve.limits import Limits

LMDEPLOY = {
    "temperature": 0.7,
    "top_p": 1,
    "n": 1,
    "max_tokens": 8,
    "stop": False,
    "stream": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "user": "string",
    "repetition_penalty": 1,
    "renew_session": False,
    "ignore_eos": False,
}


@pytest.mark.parametrize(
    "messages", ["hello", [{"role": "user", "content": "hello"}]], ids=["string", "list"]
)
@pytest.mark.parametrize(
    "more", [{}, {"model": "fake", "session_id": -1, "kwargs": {}}], ids=["documented", "client"]
)
def test_chat_request_of_lmdeploy_as_documented(api: TestClient, messages: Any, more: dict[str, Any]) -> None:
    reply = api.post("/v1/chat/completions", json={**LMDEPLOY, "messages": messages, **more})
    assert reply.status_code == 200
    assert reply.json()["usage"] == {
        "prompt_tokens": 13,
        "completion_tokens": 8,
        "total_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def turn(api: TestClient, prompt: str, **fields: Any) -> dict[str, Any]:
    reply = api.post("/v1/chat/interactive", json={"prompt": prompt, "request_output_len": 3, **fields})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def test_interactive_session_remembers_until_it_ends(api: TestClient, engine: FakeEngine) -> None:
    first = turn(api, "my name is Ada", session_id=1, interactive_mode=True)
    assert (first["history_tokens"], first["tokens"], first["finish_reason"]) == (0, 3, "length")
    second = turn(api, "who am I", session_id=1, interactive_mode=True)
    tokenizer = FakeTokenizer()
    messages = [
        {"role": "user", "content": "my name is Ada"},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "who am I"},
    ]
    assert list(engine.requests[-1].prompt_ids) == tokenizer.apply_chat_template(messages)
    assert second["history_tokens"] == first["input_tokens"] + 3
    other = turn(api, "who am I", session_id=2, interactive_mode=True)
    assert other["history_tokens"] == 0
    # The last turn outside interactive mode sees the history, and ends the session.
    assert turn(api, "bye", session_id=1)["history_tokens"] > 0
    assert turn(api, "who am I", session_id=1)["history_tokens"] == 0
    assert turn(api, "", session_id=2, request_output_len=0)["tokens"] == 0
    assert turn(api, "who am I", session_id=2, interactive_mode=True)["history_tokens"] == 0


def test_interactive_stream_is_lines_of_json(api: TestClient) -> None:
    body = {
        "prompt": "hi",
        "request_output_len": 4,
        "stream": True,
        "session_id": 5,
        "interactive_mode": True,
    }
    lines = [json.loads(line) for line in api.post("/v1/chat/interactive", json=body).text.splitlines()]
    assert [line["tokens"] for line in lines] == [1, 2, 3, 4]
    assert [line["finish_reason"] for line in lines] == [None, None, None, "length"]
    whole = turn(api, "hi", request_output_len=4)
    assert "".join(line["text"] for line in lines) == whole["text"]


def test_a_failed_turn_leaves_the_session_as_it_was(api: TestClient, engine: FakeEngine) -> None:
    turn(api, "one", session_id=1, interactive_mode=True)
    history = len(engine.requests[-1].prompt_ids)
    engine.fails = {str(n) for n in range(history + 1, 512)}
    body = {"prompt": "two", "session_id": 1, "interactive_mode": True, "request_output_len": 2}
    assert api.post("/v1/chat/interactive", json=body).status_code == 500
    streamed = api.post("/v1/chat/interactive", json={**body, "stream": True}).text
    assert json.loads(streamed)["error"]["code"] == "engine_error"
    engine.fails.clear()
    assert turn(api, "two", session_id=1, interactive_mode=True)["history_tokens"] == history + 3


def gone(api: TestClient, session: int) -> bool:
    reply = api.post(
        "/v1/chat/interactive", json={"prompt": "x", "session_id": session, "interactive_mode": True}
    )
    return reply.status_code == 404 and reply.json()["error"]["code"] == "session_gone"


def test_sessions_are_bounded_and_forgotten(engine: FakeEngine) -> None:
    config = ServeConfig(limits=Limits(sessions=20, session_idle_s=0.5))
    with TestClient(create_app(engine, FakeTokenizer(), config), base_url="http://127.0.0.1:23333") as api:
        for session in range(30):
            turn(api, "x", session_id=session, interactive_mode=True, request_output_len=1)
        sessions = api.app.state.service.sessions
        assert len(sessions) == 20
        assert gone(api, 0)  # the oldest gave way
        assert gone(api, 0)  # and is not taken for a new one when asked again
        assert turn(api, "x", session_id=29, interactive_mode=True)["history_tokens"] > 0
        for session in sessions._sessions.values():
            session.last_used -= 1.0
        assert gone(api, 29) and gone(api, 28)
        assert len(sessions) == 0
        assert turn(api, "", session_id=29, request_output_len=0)["tokens"] == 0  # ended: the id is free
        assert turn(api, "x", session_id=29)["history_tokens"] == 0


def test_tokenize(api: TestClient) -> None:
    assert api.post("/tokenize", json={"prompt": "hi"}).json() == {
        "tokens": [1, 114, 115],
        "count": 3,
        "max_model_len": 512,
    }
    bare = api.post("/tokenize", json={"prompt": "hi", "add_special_tokens": False}).json()
    assert bare["tokens"] == [114, 115]
    chat = api.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["tokens"][0] == 2
    assert api.post("/tokenize", json={}).status_code == 400


def test_encode_as_lmdeploy(api: TestClient) -> None:
    assert api.post("/v1/encode", json={"input": "hi"}).json() == {"input_ids": [1, 114, 115], "length": 3}
    several = api.post("/v1/encode", json={"input": ["hi", "a"], "add_bos": False, "do_preprocess": False})
    assert several.json() == {"input_ids": [[114, 115], [107]], "length": [2, 1]}
    long = api.post(
        "/v1/encode", json={"input": "x" * 100_000}
    ).json()  # longer than the context: only counted
    assert long["length"] == 100_001


def test_version(api: TestClient) -> None:
    assert re.fullmatch(r"[0-9]+\.[0-9]+.*|unknown", api.get("/version").json()["version"])


def test_health_asks_the_engine_for_a_token(api: TestClient, engine: FakeEngine) -> None:
    assert api.get("/health").json()["status"] == "ok"
    assert engine.requests[-1].id.startswith("health-")
    assert engine.requests[-1].sampling.max_tokens == 1


def test_metrics_count(api: TestClient, engine: FakeEngine) -> None:
    api.post("/v1/chat/completions", json={"messages": "hi", "max_tokens": 5})
    api.post("/v1/chat/completions", json={"messages": "hi", "audio": {}})
    text = api.get("/metrics").text
    assert 'tmq_http_answers_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'tmq_http_answers_total{route="/v1/chat/completions",status="400"} 1.0' in text
    assert 'tmq_sequences_finished_total{reason="length"} 1.0' in text
    assert "tmq_generated_tokens_total 5.0" in text
    assert "tmq_first_token_seconds_count 1.0" in text
    assert "tmq_blocks_free 100.0" in text
    assert "tmq_engine_up 1.0" in text
    engine.dead = True
    assert "tmq_engine_up 0.0" in api.get("/metrics").text
    engine.dead = False


def test_page_explains_the_api_and_loads_nothing(api: TestClient) -> None:
    reply = api.get("/")
    assert reply.status_code == 200
    for word in (
        "/v1/chat/completions",
        "http://127.0.0.1:23333/v1",
        "curl",
        "from openai import OpenAI",
        "fake",
    ):
        assert word in reply.text
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    outside = [
        u for u in re.findall(r"https?://[^\"'<\s]+", reply.text) if not u.startswith("http://127.0.0.1")
    ]
    assert outside == []
    assert not re.search(r"<(script|img|link|iframe)[^>]+(src|href)=", reply.text)


def test_cors_is_off_unless_named(api: TestClient) -> None:
    reply = api.get("/health", headers={"Origin": "http://127.0.0.1:23333"})
    assert "access-control-allow-origin" not in reply.headers


def test_cors_for_a_named_origin(engine: FakeEngine) -> None:
    config = ServeConfig(allow_origins=("http://localhost:3000",), api_keys=("secret",))
    with TestClient(create_app(engine, FakeTokenizer(), config), base_url="http://127.0.0.1:23333") as api:
        asks = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
        reply = api.options("/v1/chat/completions", headers=asks)
        assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert (
            api.options("/v1/chat/completions", headers={**asks, "Origin": "http://evil.test"}).status_code
            == 403
        )
