"""Constrained decoding on a tiny model of random weights: whatever it would like to say, the answer follows the schema."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import tokenizer_document

from convert.tokenizer.files import TokenizerFiles
from convert.tokenizer.tokenizer import Tokenizer
from engine.api import Request, SamplingParams
from engine.config import EngineConfig
from engine.loading import make_core
from engine.model.random_weights import SHAPES, random_checkpoint
from engine.process.ranks import decode_plan, encode_plan
from engine.serving.core import EngineCore
from engine.serving.scheduler import Join, Segment, StepPlan

pytest.importorskip("llguidance")
TINY = replace(SHAPES["tiny"], hidden_size=64, intermediate_size=96, num_heads=4, head_dim=16, vocab_size=264)
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


def engine(**options: Any) -> EngineCore:
    ckpt = random_checkpoint("tiny", torch.device("cpu"), seed=3)
    ckpt.config = TINY
    files = TokenizerFiles(tokenizer_document(), {}, None, (258,), {}, None)
    settings = {
        "device": "cpu",
        "block_size": 16,
        "max_batch": 8,
        "max_step_tokens": 64,
        "context_length": 512,
    }
    return make_core(ckpt, EngineConfig(**{**settings, **options}), Tokenizer(files, "tiny"))


def answers(core: EngineCore, requests: list[Request]) -> dict[str, tuple[str, str | None]]:
    texts, ends = {r.id: "" for r in requests}, {}
    for request in requests:
        core.add(request)
    while core.has_work:
        for event in core.step():
            texts[event.request_id] += event.text
            if event.finish_reason:
                ends[event.request_id] = event.error or event.finish_reason
    assert core.blocks.free == core.blocks.total
    return {name: (text, ends[name]) for name, text in texts.items()}


def guided(seed: int, schema: dict[str, Any] | str, tokens: int = 480, **sampling: Any) -> Request:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    params = SamplingParams(
        max_tokens=tokens, json_schema=text, seed=seed, **{"temperature": 1.5, **sampling}
    )
    return Request(f"r{seed}", (65 + seed % 20, 66), params)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.0}, {"top_p": 0.5, "top_k": 5, "repetition_penalty": 1.3}]
)
def test_answers_follow_the_schema(sampling: dict[str, Any]) -> None:
    """In a batch with sequences that follow nothing, which stay as they are without the others."""
    free = [
        Request(f"f{i}", (70 + i,), SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
        for i in range(4)
    ]
    requests = [guided(seed, PERSON, **sampling) for seed in range(12)]
    got = answers(engine(), [*requests, *free])
    for request in requests:
        text, reason = got[request.id]
        assert reason == "stop", (text, reason)
        value = json.loads(text)
        assert set(value) == set(PERSON["properties"]) and value["kind"] in ("cat", "dog")
        assert (
            0 <= value["age"] <= 150
            and len(value["name"]) <= 5
            and all(t in (True, False) for t in value["tags"])
        )
    assert {r.id: got[r.id] for r in free} == answers(engine(), free)


def test_any_object_is_json_as_far_as_it_goes() -> None:
    for text, reason in answers(
        engine(), [guided(seed, {"type": "object"}, 400) for seed in range(6)]
    ).values():
        assert text.startswith("{") and reason in ("stop", "length")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)


def test_preempted_answers_go_on_where_they_were() -> None:
    probe = engine()
    few = 12 * probe.runner.cache.size_bytes // probe.runner.num_blocks
    cramped = engine(cache_bytes=few, context_length=192)
    requests = [guided(seed, PERSON, 180) for seed in range(10)]
    together = answers(cramped, requests)
    assert cramped.scheduler.preemptions > 0
    assert together == answers(engine(context_length=192), requests)


@pytest.mark.parametrize(
    "schema",
    [
        '{"type": "strin"}',
        '{"type": "string", "pattern": "(?=a)b"}',
        '{"$ref": "http://example.test/x"}',
        "[",
        "7",
    ],
    ids=["type", "look-ahead", "remote", "broken", "number"],
)
def test_a_schema_that_cannot_be_followed_ends_its_request_alone(schema: str) -> None:
    other = Request("other", (70,), SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
    got = answers(engine(), [guided(0, schema), other])
    assert "schema" in str(got["r0"][1]) and got["other"][1] == "length"


def test_log_probabilities_are_those_of_the_model() -> None:
    """The mask decides what is drawn, not how likely the model finds it."""
    core = engine()
    core.add(guided(1, {"enum": ["zebra"]}, temperature=0.0, logprobs=3))
    events = []
    while core.has_work:
        events += core.step()
    scores = [p for event in events for p in event.logprobs]
    assert "".join(event.text for event in events) == '"zebra"' and events[-1].finish_reason == "stop"
    assert any(p.logprob < p.top[0][2] for p in scores)  # forced against what the model likes most
    assert all(p.logprob < 0 for p in scores)


def test_masks_reach_the_ranks_of_a_group() -> None:
    rng = random.Random(0)
    mask = "".join(rng.choice("ABCD") for _ in range(44))
    segment = Segment(0, 0, 2, (1, 2), (0,), True, (2,), mask)
    plan = StepPlan((segment,), (Join(0, SamplingParams(json_schema="{}"), 0, (1, 2), ()),), ())
    assert decode_plan(encode_plan(plan)) == plan
