"""Tensor parallelism on the CPU: two gloo ranks give the tokens of one process."""

import pytest

from engine.api import Request, SamplingParams
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.launch import load_source
from engine.ranks import decode_plan, encode_plan
from engine.scheduler import Join, Segment, StepPlan
from engine.source import ModelSource


def generate(core: EngineCore) -> dict[str, tuple[int, ...]]:
    tokens: dict[str, tuple[int, ...]] = {}
    for i in range(6):
        sampling = SamplingParams(
            temperature=0.0 if i % 2 else 0.8, top_p=0.9, seed=i, max_tokens=6 + i, ignore_eos=True
        )
        core.add(Request(f"r{i}", tuple(range(1, 20 * i + 2)), sampling))
    while core.has_work:
        for event in core.step():
            assert event.error is None, event.error
            tokens[event.request_id] = tokens.get(event.request_id, ()) + event.token_ids
    return tokens


@pytest.mark.parametrize(("weights", "kv_bits"), [("fp16", 16), ("int4", 8)])
def test_two_ranks_give_the_tokens_of_one(weights, kv_bits):
    source = ModelSource(random_weights="tiny", weights=weights)
    options = {
        "device": "cpu",
        "kv_bits": kv_bits,
        "max_batch": 4,
        "max_step_tokens": 48,
        "context_length": 256,
    }
    expected = generate(load_source(source, EngineConfig(**options)))
    core = load_source(source, EngineConfig(**options, tp=2))
    try:
        assert generate(core) == expected
    finally:
        core.close()


def test_plans_survive_the_pipe():
    sampling = SamplingParams(stop=("a",), stop_token_ids=(3,), logit_bias=((4, -1.5),), seed=None)
    plan = StepPlan(
        (Segment(1, 5, 1, (), (7, 8), True), Segment(0, 0, 2, (5, 6), (3,), False)),
        (Join(0, sampling, 2**63, (5, 6), (9,)),),
        (),
    )
    assert decode_plan(encode_plan(plan)) == plan
