"""Tools and answers in a given form: calls read from the model's text, forced by constrained decoding, refused by name."""

import json
from typing import Any

import httpx
import openai
import pytest
from live_server import LiveServer, live_server
from tool_server import CALL, HERMES_TEMPLATE, TOOLS, Scripted, Template, client, prompt

from serve.prompts.tool_formats import HERMES, LLAMA, MISTRAL, CallReader, format_of

CHAT = "/v1/chat/completions"
SAMPLES = {  # format, what the model writes, its text, the names that it calls
    "hermes": (HERMES, f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>", "Let me see.\n", ["weather"]),
    "hermes-two": (HERMES, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL.replace('weather', 'train')}</tool_call>", "", ["weather", "train"]),
    "hermes-cut": (HERMES, f"<tool_call>\n{CALL}", "", ["weather"]),
    "hermes-broken": (HERMES, "<tool_call>{oops}</tool_call> so", "<tool_call>{oops}</tool_call> so", []),
    "hermes-unknown": (HERMES, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', []),
    "hermes-none": (HERMES, "2 < 3 <tool", "2 < 3 <tool", []),
    "llama": (LLAMA, CALL.replace("arguments", "parameters"), "", ["weather"]),
    "llama-text": (LLAMA, "It rains {a lot}.", "It rains {a lot}.", []),
    "llama-json-answer": (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
    "mistral": (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", "", ["weather", "weather"]),
    "mistral-skipped-token": (MISTRAL, f" [{CALL}]", "", ["weather"]),
    "mistral-text": (MISTRAL, "[1, 2] are numbers", "[1, 2] are numbers", []),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("name", SAMPLES)
def test_calls_are_read_wherever_the_text_is_cut(name: str, size: int) -> None:
    format, written, text, names = SAMPLES[name]
    reader = CallReader(format, ["weather", "train"])
    pieces = [reader.push(written[i : i + size]) for i in range(0, len(written), size)] + [reader.finish()]
    calls = [call for piece in pieces for call in piece.calls]
    assert [call.name for call in calls] == names
    got = "".join(piece.text for piece in pieces)
    assert got == text or (calls and got.strip() == text.strip())
    for call in calls:
        assert json.loads(call.arguments) == {"city": "Köln", "days": 2}
        assert len(call.id) == 9 if format == MISTRAL else call.id.startswith("call_")
    assert len({call.id for call in calls}) == len(calls)


def test_formats_are_known_by_their_templates() -> None:
    assert format_of(HERMES_TEMPLATE) == HERMES
    assert format_of("{{ '[TOOL_CALLS] [' }}{{ x }}") == MISTRAL
    assert format_of("{% if m.role == 'tool' %}{{ 'ipython' }}{% endif %}") == LLAMA
    assert format_of("<tool_call>\n<function={{ name }}>") is None  # Qwen3-Coder
    assert format_of("{{ m.content }}") is None


def test_a_call_and_its_result_through_the_official_client(hermes: LiveServer) -> None:
    hermes.engine.script = f"One moment.<tool_call>{CALL}</tool_call>"  # type: ignore[attr-defined]
    messages: list[Any] = [{"role": "user", "content": "Rain?"}]
    api = client(hermes)
    answer = api.chat.completions.create(model="fake", messages=messages, tools=TOOLS)  # type: ignore[call-overload]
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "One moment."
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "weather",
        {"city": "Köln", "days": 2},
    )
    assert all(json.dumps(tool) in prompt(hermes) for tool in TOOLS)
    hermes.engine.script = "It rains."  # type: ignore[attr-defined]
    messages += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "wet"},
    ]
    final = api.chat.completions.create(model="fake", messages=messages, tools=TOOLS)  # type: ignore[call-overload]
    assert final.choices[0].message.content == "It rains." and final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.tool_calls is None
    assert '"arguments": {"city": "Köln", "days": 2}' in prompt(hermes) and "tool\nwet" in prompt(hermes)


@pytest.mark.parametrize("parallel", [None, True, False])
def test_calls_are_streamed_whole(hermes: LiveServer, parallel: bool | None) -> None:
    hermes.engine.script = f"A <b> c.<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"  # type: ignore[attr-defined]
    more = {} if parallel is None else {"parallel_tool_calls": parallel}
    stream = client(hermes).chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "x"}], tools=TOOLS, stream=True, **more
    )  # type: ignore[call-overload]
    chunks = [chunk.choices[0] for chunk in stream]
    calls = [call for c in chunks for call in c.delta.tool_calls or []]
    assert "".join(c.delta.content or "" for c in chunks) == "A <b> c."
    assert [call.index for call in calls] == ([0] if parallel is False else [0, 1])
    assert all(json.loads(call.function.arguments)["days"] == 2 for call in calls)
    assert chunks[-1].finish_reason == "tool_calls"


def test_tool_choice_none_gives_the_model_no_tools(hermes: LiveServer) -> None:
    hermes.engine.script = f"<tool_call>{CALL}</tool_call>"  # type: ignore[attr-defined]
    body = {"messages": "x", "tools": TOOLS, "tool_choice": "none"}
    choice = httpx.post(hermes.url + CHAT, json=body, timeout=60).json()["choices"][0]
    assert choice["message"]["content"].startswith("<tool_call>") and "<tools>" not in prompt(hermes)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "choice-without-tools": ({"tool_choice": "required"}, "tool_choice"),
    "choice-of-another": ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
    "arguments": ({"messages": [{"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "[1]"}}]}]}, "messages.0.tool_calls.0.function.arguments"),
    "calls-of-a-user": ({"messages": [{"role": "user", "content": "x", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]}]}, "messages.0.tool_calls"),
    "name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    "schema-missing": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    "effort": ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    "template-kwargs": ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
    "thinking-unread": ({"chat_template_kwargs": {"thinking": True}}, "thinking"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(hermes: LiveServer, name: str) -> None:
    fields, param = REFUSED[name]
    reply = httpx.post(hermes.url + CHAT, json={"messages": "x", **fields}, timeout=60)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [({"reasoning_effort": "none"}, False), ({"reasoning_effort": "high"}, True), ({"enable_thinking": False}, False),
     ({"chat_template_kwargs": {"enable_thinking": False}}, False), ({}, True)],
)  # fmt: skip
def test_reasoning_is_switched_where_the_template_reads_it(
    hermes: LiveServer, fields: dict[str, Any], thinks: bool
) -> None:
    hermes.engine.script = "ok"  # type: ignore[attr-defined]
    assert httpx.post(hermes.url + CHAT, json={"messages": "x", **fields}, timeout=60).status_code == 200
    assert ("<think></think>" in prompt(hermes)) is not thinks


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0].content }}", "takes no tools"),
        ("{{ tools }}<tool_call>\n<function=", "not known here"),
    ],
    ids=["no-tools", "unknown-format"],
)
def test_models_without_tools_refuse_them_by_name(template: str, words: str) -> None:
    with live_server(Scripted(), tokenizer=Template(template)) as server:
        reply = httpx.post(server.url + CHAT, json={"messages": "x", "tools": TOOLS}, timeout=60)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "tools" and words in reply.text
        for fields in ({"reasoning_effort": "high"}, {"enable_thinking": True}):
            assert (
                httpx.post(server.url + CHAT, json={"messages": "x", **fields}, timeout=60).status_code == 400
            )


def test_an_answer_follows_its_schema(real: LiveServer) -> None:
    """Random weights would say anything: what comes is what the schema allows."""
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 5}, "s": {"enum": ["a", "b"]}},
              "required": ["n", "s"], "additionalProperties": False}  # fmt: skip
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for stream in (False, True):
        answer = client(real).chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "go"}],
            max_tokens=900,
            response_format=form,
            seed=3,
            stream=stream,
        )  # type: ignore[call-overload]
        text = (
            "".join(c.choices[0].delta.content or "" for c in answer)
            if stream
            else answer.choices[0].message.content
        )
        value = json.loads(text)
        assert set(value) == {"n", "s"} and value["n"] in range(1, 6) and value["s"] in ("a", "b")
    body = {"prompt": "x", "max_tokens": 900, "response_format": form, "seed": 4}
    reply = httpx.post(real.url + "/v1/completions", json=body, timeout=120).json()
    assert json.loads(reply["choices"][0]["text"])["s"] in ("a", "b")


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "train"}}], ids=["any", "named"]
)
def test_a_call_can_be_forced(real: LiveServer, choice: Any) -> None:
    answer = client(real).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "go"}],
        max_tokens=900,
        tools=TOOLS,
        tool_choice=choice,
        seed=5,
    )  # type: ignore[call-overload]
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "train" or (choice == "required" and call.function.name == "weather")
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None


@pytest.mark.parametrize(
    "schema", [{"type": "strin"}, {"pattern": "(?=a)", "type": "string"}, {"a": "x" * 70_000}]
)
def test_a_schema_that_cannot_be_followed_is_refused(real: LiveServer, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client(real).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "go"}], response_format=form
        )  # type: ignore[call-overload]
    assert "schema" in caught.value.message


def test_without_the_library_the_extra_is_named(hermes: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.http.generation.prompts.is_available", lambda: False)
    reply = httpx.post(
        hermes.url + CHAT, json={"messages": "x", "response_format": {"type": "json_object"}}, timeout=60
    )
    assert reply.status_code == 400 and "turbomind-quant[structured]" in reply.text
