"""/v1/responses through the official client: text, instructions, streamed events, tools and their results, refusals."""

import json
from typing import Any

import httpx
import openai
import pytest
from fake_engine import FakeEngine
from live_server import LiveServer, live_server
from tool_server import CALL, TOOLS, client, prompt

URL = "/v1/responses"
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]


def test_text_with_instructions(hermes: LiveServer) -> None:
    hermes.engine.script = "Good day."  # type: ignore[attr-defined]
    answer = client(hermes).responses.create(
        model="fake", input="Hello", instructions="Be brief.", max_output_tokens=50
    )
    assert answer.output_text == "Good day." and answer.status == "completed" and answer.object == "response"
    assert answer.usage.output_tokens == len("Good day.") and answer.usage.input_tokens > 10
    assert "system\nBe brief." in prompt(hermes) and "user\nHello" in prompt(hermes)


def test_a_conversation_in_items(hermes: LiveServer) -> None:
    hermes.engine.script = "Fine."  # type: ignore[attr-defined]
    items: list[Any] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "How "}, {"type": "input_text", "text": "are you?"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [
            {"type": "output_text", "text": "Well.", "annotations": []}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    assert client(hermes).responses.create(model="fake", input=items, store=True).output_text == "Fine."
    for text in ("system\nBe kind.", "user\nHow are you?", "assistant\nWell.", "user\nAnd now?"):
        assert text in prompt(hermes)


def test_streamed_events_make_the_same_response(hermes: LiveServer) -> None:
    hermes.engine.script = "Good day, 你好."  # type: ignore[attr-defined]
    with client(hermes).responses.stream(model="fake", input="Hello") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "Good day, 你好."
    assert [e.sequence_number for e in events if hasattr(e, "sequence_number")] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == final.output_text


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_and_its_result(hermes: LiveServer, stream: bool) -> None:
    hermes.engine.script = f"Wait.<tool_call>{CALL}</tool_call>"  # type: ignore[attr-defined]
    api = client(hermes)
    if stream:
        with api.responses.stream(model="fake", input="Rain?", tools=FLAT) as events:  # type: ignore[arg-type]
            answer: Any = events.get_final_response()
    else:
        answer = api.responses.create(model="fake", input="Rain?", tools=FLAT)  # type: ignore[call-overload]
    message, call = answer.output
    assert message.content[0].text == "Wait." and call.type == "function_call" and call.name == "weather"
    assert json.loads(call.arguments) == {"city": "Köln", "days": 2}
    hermes.engine.script = "Take an umbrella."  # type: ignore[attr-defined]
    items = [
        {"role": "user", "content": "Rain?"},
        *(item.model_dump(exclude_none=True) for item in answer.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "wet"},
    ]
    for item in items:
        item.pop("parsed_arguments", None)
        for part in item["content"] if isinstance(item.get("content"), list) else []:
            part.pop("parsed", None)
    final = api.responses.create(model="fake", input=items, tools=FLAT)  # type: ignore[call-overload]
    assert final.output_text == "Take an umbrella."
    assert "tool\nwet" in prompt(hermes) and '"city": "Köln"' in prompt(hermes)


def test_a_cut_answer_is_incomplete() -> None:
    with live_server(FakeEngine()) as server:
        answer = client(server).responses.create(model="fake", input="Hello", max_output_tokens=3)
        assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
        with client(server).responses.stream(model="fake", input="Hello", max_output_tokens=3) as stream:
            assert [event.type for event in stream][-1] == "response.incomplete"


def test_a_failure_inside_a_stream_is_an_event() -> None:
    engine = FakeEngine()
    engine.fails = {str(n) for n in range(1, 100)}
    with live_server(engine) as server:
        text = httpx.post(server.url + URL, json={"input": "x", "stream": True}, timeout=60).text
        last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
        assert last["type"] == "response.failed" and "failed" in last["response"]["error"]["message"]


def test_an_answer_in_a_given_form(real: LiveServer) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    answer = client(real).responses.create(model="tiny", input="go", text=form, max_output_tokens=900)  # type: ignore[call-overload]
    assert isinstance(json.loads(answer.output_text)["ok"], bool)


REFUSED: dict[str, dict[str, Any]] = {
    "previous_response_id": {"previous_response_id": "resp_1"},
    "background": {"background": True},
    "conversation": {"conversation": "c"},
    "tools.0.type": {"tools": [{"type": "web_search", "name": "x"}]},
    "input.0.content": {"input": [{"role": "user"}]},
    "input.0.call_id": {"input": [{"type": "function_call_output", "output": "x"}]},
    "input.0.arguments": {
        "input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "[]"}]
    },
    "tool_choice": {"tool_choice": "required"},
    "input": {"input": ""},
}


@pytest.mark.parametrize("param", REFUSED)
def test_what_is_not_done_is_refused_by_name(hermes: LiveServer, param: str) -> None:
    reply = httpx.post(hermes.url + URL, json={"input": "x", **REFUSED[param]}, timeout=60)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text


def test_errors_have_the_types_of_the_client(hermes: LiveServer) -> None:
    with pytest.raises(openai.NotFoundError):
        client(hermes).responses.create(model="gpt-4", input="x")
