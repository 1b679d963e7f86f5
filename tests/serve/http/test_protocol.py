"""What request models take: values that ask for nothing, and checks that end at the first finding."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from starlette.testclient import TestClient

from serve.http.protocol.chat import ChatRequest, CompletionRequest
from serve.http.protocol.lmdeploy import EncodeRequest, InteractiveRequest, TokenizeChat

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hello"}]

DEFAULTS: dict[str, Any] = {
    "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "metadata": {},
    "service_tier": "auto", "modalities": ["text"], "reasoning_effort": "none", "store": False, "top_k": -1,
    "functions": [], "logit_bias": {}, "stop": [], "n": 1, "chat_template_kwargs": {}, "min_tokens": 0, "stop_token_ids": [],
    "prompt_cache_key": "k", "safety_identifier": "u", "best_of": 1, "logprobs": False, "length_penalty": 1.0,
    "early_stopping": False, "use_beam_search": False, "documents": [], "function_call": "none", "verbosity": "medium",
    "add_generation_prompt": True, "continue_final_message": False, "adapter_name": "", "min_new_tokens": 0, "priority": 0,
}  # fmt: skip
TEXT_DEFAULTS: dict[str, Any] = {
    "best_of": 1, "echo": False, "suffix": "", "logprobs": None, "use_beam_search": False, "add_special_tokens": True,
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_spelled_out_ask_for_nothing(api: TestClient, name: str) -> None:
    reply = api.post(CHAT, json={"messages": USER, "max_tokens": 2, name: DEFAULTS[name]})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("name", TEXT_DEFAULTS)
def test_completion_defaults_spelled_out_ask_for_nothing(api: TestClient, name: str) -> None:
    reply = api.post(TEXT, json={"prompt": "Hello", "max_tokens": 2, name: TEXT_DEFAULTS[name]})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    "more",
    [
        {"type": "text"},
        {"type": "message"},
        {"name": "ada"},
        {"tool_calls": []},
        {"tool_calls": None, "refusal": None, "annotations": [], "audio": None},
    ],
    ids=["lm-eval-type", "message-type", "name", "no-calls", "nulls"],
)
def test_messages_with_fields_that_change_nothing(api: TestClient, more: dict[str, Any]) -> None:
    messages = [*USER, {"role": "assistant", "content": "Hi"}, {**USER[0], **more}]
    reply = api.post(CHAT, json={"messages": messages, "max_tokens": 2})
    assert reply.status_code == 200, reply.text


def test_best_of_other_than_n_is_refused(api: TestClient) -> None:
    assert api.post(TEXT, json={"prompt": "x", "n": 2, "best_of": 2}).status_code == 200
    reply = api.post(TEXT, json={"prompt": "x", "n": 2, "best_of": 3})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "best_of"


def test_stop_token_ids_reach_the_engine_and_are_checked(api: TestClient, engine: Any) -> None:
    assert api.post(TEXT, json={"prompt": "x", "stop_token_ids": [3, 4]}).status_code == 200
    assert engine.requests[-1].sampling.stop_token_ids == (3, 4)
    assert (
        api.post(TEXT, json={"prompt": "x", "stop_token_ids": [300]}).json()["error"]["param"]
        == "stop_token_ids"
    )


MANY = 200_000
HUGE: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "content-parts": (ChatRequest, {"messages": [{"role": "user", "content": [1] * MANY}]}),
    "messages": (ChatRequest, {"messages": [[]] * MANY}),
    "right-then-wrong": (ChatRequest, {"messages": [*USER * 1000, *[1] * MANY]}),
    "stop": (ChatRequest, {"messages": "x", "stop": [1] * MANY}),
    "tools": (ChatRequest, {"messages": "x", "tools": [1] * MANY}),
    "tool-calls": (ChatRequest, {"messages": [{**USER[0], "tool_calls": [{}] * MANY}]}),
    "stop-ids": (ChatRequest, {"messages": "x", "stop_token_ids": ["a"] * MANY}),
    "modalities": (ChatRequest, {"messages": "x", "modalities": ["audio"] * MANY}),
    "metadata": (ChatRequest, {"messages": "x", "metadata": {str(i): 1 for i in range(MANY)}}),
    "bias": (CompletionRequest, {"prompt": "x", "logit_bias": {str(i): "x" for i in range(MANY)}}),
    "ids": (CompletionRequest, {"prompt": [-1] * MANY}),
    "lists": (CompletionRequest, {"prompt": [[-1]] * MANY}),
    "texts": (CompletionRequest, {"prompt": ["a"] * MANY}),
    "unknown": (ChatRequest, {"messages": "x", **{f"a{i}": 1 for i in range(MANY)}}),
    "unknown-in-message": (ChatRequest, {"messages": [{**USER[0], **{f"a{i}": 1 for i in range(MANY)}}]}),
    "interactive": (InteractiveRequest, {"prompt": [1] * MANY}),
    "encode": (EncodeRequest, {"input": [1] * MANY}),
    "tokenize": (TokenizeChat, {"messages": [1] * MANY}),
}


@pytest.mark.parametrize("case", HUGE)
def test_checking_ends_at_the_first_finding(case: str) -> None:
    """What is found is collected: without an end, a megabyte of wrong items costs seconds on the event loop."""
    model, body = HUGE[case]
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= 6


def lists_of(schema: Any) -> list[Any]:
    found = [schema] if isinstance(schema, dict) and schema.get("type") == "list" else []
    parts = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
    return found + [inner for part in parts if isinstance(part, dict | list) for inner in lists_of(part)]


@pytest.mark.parametrize(
    "model", [ChatRequest, CompletionRequest, InteractiveRequest, EncodeRequest, TokenizeChat]
)
def test_every_list_ends_at_its_first_fault(model: type[BaseModel]) -> None:
    """A list of items with a type of their own must fail fast; one that may only be empty has no items to check."""
    typed = [
        s for s in lists_of(model.__pydantic_core_schema__) if s.get("items_schema", {}).get("type") != "any"
    ]
    assert typed and all(schema.get("fail_fast") for schema in typed)
