"""Log-probabilities of a prompt: against whole forward passes in float64 arithmetic of the softmax, in chunks, after preemption."""

from dataclasses import replace

import pytest
import torch

from engine.api import Event, Request, SamplingParams
from engine.config import EngineConfig
from engine.loading import make_core
from engine.model.forward import causal_attend
from engine.model.random_weights import SHAPES, random_checkpoint
from engine.serving.core import EngineCore

TINY = replace(SHAPES["tiny"], hidden_size=64, intermediate_size=96, num_heads=4, head_dim=16, vocab_size=300)
JUDGE = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=3)


def engine(**options) -> EngineCore:
    ckpt = random_checkpoint("tiny", torch.device("cpu"), seed=3)
    ckpt.config = TINY
    settings = {
        "device": "cpu",
        "block_size": 16,
        "max_batch": 8,
        "max_step_tokens": 32,
        "context_length": 128,
    }
    return make_core(ckpt, EngineConfig(**{**settings, **options}))


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 300, (length,), generator=generator).tolist())


def run(core: EngineCore, requests: list[Request]) -> dict[str, list[Event]]:
    events: dict[str, list[Event]] = {r.id: [] for r in requests}
    for request in requests:
        core.add(request)
    while core.has_work:
        for event in core.step():
            assert event.error is None, event.error
            events[event.request_id].append(event)
    assert core.blocks.free == core.blocks.total
    return events


def whole(core: EngineCore, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities (T, V) of every next token, from one forward pass without a cache, softmax in float64."""
    model = core.runner.model
    with torch.inference_mode():
        attend = causal_attend(1, len(ids), model.config)
        return torch.log_softmax(model(torch.tensor(ids), torch.arange(len(ids)), attend).double(), dim=-1)


@pytest.mark.parametrize("length", [2, 31, 32, 33, 100, 128])
def test_scores_equal_those_of_a_whole_forward_pass(length: int) -> None:
    """Prompts over several chunks of 32 tokens, up to the whole context of 128."""
    core, ids = engine(), prompt(length)
    (event,) = run(core, [Request("a", ids, JUDGE)])["a"]
    assert event.finish_reason == "length" and event.completion_tokens == 0 and event.token_ids == ()
    expected = whole(core, ids)
    assert [s.token_id for s in event.prompt_logprobs] == list(ids[1:])
    for place, score in enumerate(event.prompt_logprobs):
        row = expected[place]
        assert score.logprob == pytest.approx(row[score.token_id].item(), abs=2e-5)
        assert score.rank == 1 + int((row > row[score.token_id]).sum())
        top = row.topk(3)
        assert [i for i, _, _ in score.top] == top.indices.tolist()
        assert [v for _, _, v in score.top] == pytest.approx(top.values.tolist(), abs=2e-5)


def test_scores_come_once_and_the_answer_is_the_same() -> None:
    ids = prompt(70)
    plain = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    asked = run(engine(), [Request("a", ids, replace(plain, prompt_logprobs=0))])["a"]
    bare = run(engine(), [Request("a", ids, plain)])["a"]
    assert [len(e.prompt_logprobs) for e in asked] == [69, 0, 0, 0, 0, 0]
    assert all(s.top == () for s in asked[0].prompt_logprobs)
    assert [e.token_ids for e in asked] == [e.token_ids for e in bare]


def test_scores_do_not_depend_on_who_shares_the_batch() -> None:
    """14 sequences in 12 blocks: chunks and preemptions. Where chunks are cut elsewhere the last bits of attention differ."""
    batch = [
        Request(f"r{i}", prompt(20 + 5 * i, i), SamplingParams(temperature=0.0, max_tokens=30, prompt_logprobs=2, ignore_eos=True))
        for i in range(14)
    ]  # fmt: skip
    probe = engine()
    cramped = engine(cache_bytes=12 * probe.runner.cache.size_bytes // probe.runner.num_blocks)
    together = run(cramped, batch)
    assert cramped.scheduler.preemptions > 0
    for request in batch:
        alone = run(engine(), [request])[request.id]
        (scores,) = [e.prompt_logprobs for e in together[request.id] if e.prompt_logprobs]
        assert [s.token_id for s in scores] == list(request.prompt_ids[1:])
        expected = [s.logprob for s in alone[0].prompt_logprobs]
        assert [s.logprob for s in scores] == pytest.approx(expected, abs=1e-5)


def test_scores_that_are_not_finite_end_the_request() -> None:
    core = engine()
    core.runner.model.head = lambda hidden: torch.full((len(hidden), 300), torch.nan)
    core.add(Request("a", prompt(5), JUDGE))
    events = [event for _ in range(3) for event in core.step()]
    assert events[-1].finish_reason == "error" and "not finite" in (events[-1].error or "")
