"""Tensor parallelism on the CPU: two gloo ranks give the tokens of one process."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from engine.api import Request, SamplingParams
from engine.config import EngineConfig
from engine.process.environment import child_environment
from engine.process.launch import load_source
from engine.process.ranks import decode_plan, encode_plan
from engine.serving.core import EngineCore
from engine.serving.scheduler import Join, Segment, StepPlan
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


def test_a_rank_ends_soon_after_rank_0_even_while_it_waits_for_it(tmp_path):
    """Else a killed engine leaves processes that hold their GPUs until the group's time is up, ten minutes later."""
    config = EngineConfig(device="cpu", tp=2)
    first = {"source": asdict(ModelSource(random_weights="tiny")), "config": asdict(config), "rank": 1}
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.process.ranks"],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=child_environment(),
    )
    try:
        process.communicate(json.dumps({**first, "store": str(tmp_path / "store")}) + "\n", timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1


LOSES_A_RANK = """
import sys
sys.executable = sys.argv[1]
from engine.config import EngineConfig
from engine.process.ranks import start_group
from engine.source import ModelSource
start_group(ModelSource(random_weights="tiny"), EngineConfig(device="cpu", tp=2))
"""


def test_rank_0_does_not_wait_for_a_rank_that_has_ended_while_loading(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nread line\nexit 3\n")
    broken.chmod(0o755)
    command = [sys.executable, "-c", LOSES_A_RANK, str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=child_environment())
    assert done.returncode == 1 and "rank ended with code 3" in done.stderr


def test_plans_survive_the_pipe():
    sampling = SamplingParams(stop=("a",), stop_token_ids=(3,), logit_bias=((4, -1.5),), seed=None)
    plan = StepPlan(
        (Segment(1, 5, 1, (), (7, 8), True), Segment(0, 0, 2, (5, 6), (3,), False)),
        (Join(0, sampling, 2**63, (5, 6), (9,)),),
        (),
    )
    assert decode_plan(encode_plan(plan)) == plan
