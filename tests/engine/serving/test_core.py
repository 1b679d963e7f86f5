"""The engine core on a fake model: batching, preemption, aborts, deadlines, faults, limits. No tensor is computed."""

import random
import weakref
from collections import defaultdict
from dataclasses import replace

import fake_model as fake
import pytest
import torch

from engine.api import EngineDied, Request, SamplingParams
from engine.config import EngineConfig
from engine.serving.core import EngineCore

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def make_core(runner=None, *, clock=None, max_batch=8, max_step_tokens=16, **runner_options):
    runner = runner or fake.FakeRunner(**runner_options)
    config = EngineConfig(max_batch=max_batch, max_step_tokens=max_step_tokens)
    core = EngineCore(runner, config, fake.Letters(), clock=clock or Clock())
    return core


def run_all(core, limit=100_000):
    """Step until idle; events by request, and the step in which each request ended."""
    events, ended, step = defaultdict(list), {}, 0
    while core.has_work:
        step += 1
        assert step < limit, "the engine does not come to an end"
        for event in core.step():
            assert event.request_id not in ended, "an event after the last one"
            events[event.request_id].append(event)
            if event.finish_reason is not None:
                ended[event.request_id] = step
    return events, ended


def text_of(events):
    return "".join(event.text for event in events)


def tokens_of(events):
    return tuple(token for event in events for token in event.token_ids)


def random_request(rng, name, longest=60):
    prompt = tuple(rng.randrange(fake.VOCAB) for _ in range(rng.randint(1, longest)))
    stop = tuple(chr(33 + rng.randrange(fake.VOCAB)) for _ in range(rng.choice([0, 0, 1])))
    return Request(name, prompt, SamplingParams(temperature=0.0, max_tokens=rng.randint(1, 40), stop=stop))


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("blocks", [26, 200])
def test_batched_tokens_equal_those_of_each_request_alone(lookahead, blocks):
    rng = random.Random(blocks + lookahead)
    requests = [random_request(rng, f"r{i}") for i in range(60)]
    core = make_core(num_blocks=blocks, lookahead=lookahead)
    for request in requests:
        core.add(request)
    events, _ = run_all(core)
    for request in requests:
        got = events[request.id]
        assert (tokens_of(got), got[-1].finish_reason) == fake.alone(request)
        assert got[-1].completion_tokens == len(tokens_of(got))
    assert core.blocks.free == core.blocks.total
    if blocks == 26:
        assert core.scheduler.preemptions > 0


@pytest.mark.parametrize("one_client", [True, False], ids=["one-client", "clients"])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_2000_random_requests_with_random_aborts_leak_and_cross_nothing(lookahead, one_client):
    """I96, I97: blocks return to the start, every text is a beginning of the right one, nobody waits without bound."""
    rng = random.Random(11 + lookahead)
    core = make_core(num_blocks=40, lookahead=lookahead, max_batch=6, max_step_tokens=24)
    requests = {f"r{i}": random_request(rng, f"r{i}") for i in range(2000)}
    clients = ("",) if one_client else ("a", "a", "a", "b", "c")
    requests = {name: replace(r, client=rng.choice(clients)) for name, r in requests.items()}
    arrivals = iter(requests.values())
    alive, events, submitted_at, started_at, aborted = set(), defaultdict(list), {}, {}, set()
    step = 0
    while True:
        for _ in range(rng.choice([0, 0, 1, 2])):
            request = next(arrivals, None)
            if request is not None:
                core.add(request)
                alive.add(request.id)
                submitted_at[request.id] = step
        if alive and rng.random() < 0.2:
            victim = rng.choice(sorted(alive))
            core.abort(victim)
            aborted.add(victim)
        if len(submitted_at) == len(requests) and not core.has_work:
            break
        step += 1
        assert step < 60_000
        for event in core.step():
            assert event.request_id in alive
            events[event.request_id].append(event)
            started_at.setdefault(event.request_id, step)
            if event.finish_reason is not None:
                alive.remove(event.request_id)
    assert not alive
    for name, request in requests.items():
        tokens, reason = fake.alone(request)
        got, last = tokens_of(events[name]), events[name][-1]
        if last.finish_reason == "abort":
            assert name in aborted and got == tokens[: len(got)]
        else:
            assert (got, last.finish_reason) == (tokens, reason)
    assert core.blocks.free == core.blocks.total
    assert not core.scheduler.running and not core.scheduler.waiting
    assert sorted(core.scheduler._free_rows) == list(range(6))
    # First tokens of a client come in the order of arrival, up to the chunks of one budget: nobody is passed by more than a batch.
    for client in clients:
        names = [name for name in started_at if requests[name].client == client]
        order = sorted(names, key=lambda name: started_at[name])
        place = {name: i for i, name in enumerate(sorted(order, key=lambda n: int(n[1:])))}
        late = max(place[name] - i for i, name in enumerate(order))
        assert late < 2 * 6 + len(aborted)


def test_a_stream_of_short_requests_does_not_starve_a_long_one():
    """I90: the long request ends within a bound that does not grow with the number of short ones behind it."""
    core = make_core(num_blocks=40, max_batch=4)
    core.add(
        Request("long", tuple(range(60)), SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))
    )
    for i in range(500):
        core.add(
            Request(f"s{i}", (i % 90, 3), SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
        )
    _, ended = run_all(core)
    assert ended["long"] < 70
    assert all(ended[f"s{i}"] <= ended[f"s{i + 8}"] + 10 for i in range(490))


def test_a_long_request_behind_short_ones_is_not_passed_by():
    core = make_core(num_blocks=32, max_batch=8)
    for i in range(6):
        core.add(Request(f"a{i}", (1, 2, i), SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)))
    core.add(
        Request("long", tuple(range(80)), SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    )
    for i in range(200):
        core.add(
            Request(f"b{i}", (5, i % 90), SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
        )
    events, ended = run_all(core)
    assert len(tokens_of(events["long"])) == 40
    # 30 steps until the first six end, 5 chunks of its prompt, 40 tokens; no later request runs before it starts.
    assert ended["long"] <= 30 + 5 + 40 + 10
    assert min(ended[f"b{i}"] for i in range(200)) > max(ended[f"a{i}"] for i in range(6))


def test_exhausted_cache_preempts_the_youngest_and_all_complete():
    """I92: eight sequences that grow to the whole cache together."""
    core = make_core(num_blocks=24, max_batch=8)
    requests = [
        Request(f"r{i}", (i, i + 1, i + 2), SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True))
        for i in range(8)
    ]
    for request in requests:
        core.add(request)
    events, ended = run_all(core)
    assert core.scheduler.preemptions > 0
    assert all(tokens_of(events[r.id]) == fake.alone(r, eos=())[0] for r in requests)
    assert min(ended, key=ended.__getitem__) == "r0"


def test_a_request_longer_than_the_cache_is_told_the_numbers():
    core = make_core(num_blocks=10, context_length=1000)
    core.add(Request("r", tuple(range(30)), SamplingParams(max_tokens=20)))
    (event,) = core.step()
    assert event.finish_reason == "error" and event.error is not None
    assert "30" in event.error and "20" in event.error and "40" in event.error and "KV cache" in event.error
    assert core.stats().context_length == 40


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (Request("r", (), GREEDY), "empty"),
        (Request("r", (1, 97), GREEDY), "outside"),
        (Request("r", (-1,), GREEDY), "outside"),
        (Request("r", (1,) * 125, GREEDY), "128"),
        (Request("r", (1,), SamplingParams(stop_token_ids=(4000,))), "stop_token_ids"),
        (Request("r", (1,), SamplingParams(logit_bias=((-3, 1.0),))), "logit_bias"),
    ],
)
def test_requests_that_cannot_run_get_an_error_event(request_, word):
    core = make_core()
    core.add(request_)
    (event,) = core.step()
    assert event.finish_reason == "error" and word in (event.error or "")
    assert not core.has_work


def test_an_id_in_use_is_refused_and_may_return_later():
    core = make_core()
    core.add(Request("r", (1,), GREEDY))
    with pytest.raises(ValueError, match="in use"):
        core.add(Request("r", (2,), GREEDY))
    run_all(core)
    core.add(Request("r", (2,), GREEDY))
    events, _ = run_all(core)
    assert tokens_of(events["r"]) == fake.alone(Request("r", (2,), GREEDY))[0]


def test_deadline_ends_waiting_and_running_requests():
    clock = Clock()
    core = make_core(clock=clock, max_batch=1, num_blocks=200)
    long = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    core.add(Request("runs", (1,), long, deadline_s=5.0))
    core.add(Request("waits", (2,), long, deadline_s=1.0))
    core.add(Request("later", (3,), GREEDY))
    ended = {}
    while core.has_work:
        clock.now += 0.5
        ended |= {e.request_id: e.finish_reason for e in core.step() if e.finish_reason}
    assert ended == {
        "waits": "timeout",
        "runs": "timeout",
        "later": fake.alone(Request("l", (3,), GREEDY))[1],
    }
    assert core.blocks.free == core.blocks.total


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_request_that_fails_in_the_engine_fails_alone(lookahead):
    """I93."""

    def faults(plan):
        if any(96 in segment.token_ids for segment in plan.segments):
            raise RuntimeError("injected")

    rng = random.Random(4)
    core = make_core(lookahead=lookahead, num_blocks=300, faults=faults)
    good = []
    for i in range(20):
        prompt = tuple(rng.randrange(96) for _ in range(rng.randint(1, 12)))
        good.append(Request(f"r{i}", prompt, GREEDY))
        core.add(good[-1])
        if i % 5 == 0:
            core.add(Request(f"bad{i}", (1, 2, 96, 4), GREEDY))
    events, _ = run_all(core)
    for request in good:
        assert tokens_of(events[request.id]) == fake.alone(request)[0]
    bad = [events[f"bad{i}"][-1] for i in (0, 5, 10, 15)]
    assert all(e.finish_reason == "error" and "injected" not in (e.error or "") for e in bad)
    assert core.blocks.free == core.blocks.total


def test_out_of_memory_halves_the_batch_and_loses_nothing():
    """E48: steps of more than five tokens do not fit; all requests are answered nevertheless."""

    def faults(plan):
        if plan.tokens > 5:
            raise torch.OutOfMemoryError("injected")

    core = make_core(num_blocks=300, faults=faults)
    requests = [random_request(random.Random(i), f"r{i}", longest=20) for i in range(20)]
    for request in requests:
        core.add(request)
    events, _ = run_all(core)
    assert all(tokens_of(events[r.id]) == fake.alone(r)[0] for r in requests)


def test_a_step_that_failed_holds_nothing_while_its_halves_run():
    """Its activations would otherwise be alive with those of the halves, by way of the error's traceback or of a cycle."""

    class Activations:
        pass

    alive = weakref.WeakSet()
    seen = []

    def faults(plan):
        seen.append(len(alive))
        activations = Activations()
        alive.add(activations)
        if plan.tokens > 2:
            activations.itself = activations
            raise torch.OutOfMemoryError("injected")

    core = make_core(num_blocks=300, faults=faults)
    request = random_request(random.Random(0), "r", longest=20)
    core.add(request)
    events, _ = run_all(core)
    assert tokens_of(events["r"]) == fake.alone(request)[0]
    assert len(seen) > 3 and set(seen) == {0}


def test_out_of_memory_at_one_token_fails_that_request_only():
    def faults(plan):
        if any(segment.start >= 10 for segment in plan.segments):
            raise torch.OutOfMemoryError("injected")

    core = make_core(num_blocks=300, faults=faults)
    core.add(Request("long", tuple(range(12)), GREEDY))
    core.add(Request("short", (1, 2), SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)))
    events, _ = run_all(core)
    assert events["long"][-1].finish_reason == "error" and "memory" in (events["long"][-1].error or "")
    assert events["short"][-1].finish_reason == "length"


def test_a_broken_device_ends_the_engine():
    def faults(plan):
        raise torch.AcceleratorError("injected")

    core = make_core(faults=faults)
    core.add(Request("r", (1,), GREEDY))
    with pytest.raises(EngineDied):
        core.step()


def test_logits_that_are_not_finite_fail_that_request_only():
    class Runner(fake.FakeRunner):
        def run(self, plan):
            pending = super().run(plan)
            if pending is not None:
                drawing = [segment for segment in plan.segments if segment.samples]
                pending._sampled.finite[:] = [segment.start < 5 for segment in drawing]
            return pending

    core = make_core(Runner(num_blocks=100))
    short = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    core.add(Request("ok", (1, 2), short))
    core.add(Request("nan", (1, 2), SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)))
    events, _ = run_all(core)
    assert events["ok"][-1].finish_reason == "length"
    assert events["nan"][-1].finish_reason == "error" and "finite" in (events["nan"][-1].error or "")


def test_stop_ids_and_stop_strings_end_a_request_and_stay_out_of_the_text():
    whole = fake.alone(Request("r", (5, 6), SamplingParams(max_tokens=30, ignore_eos=True)))[0]
    text = "".join(chr(33 + t) for t in whole)
    cases = {
        "id": SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop_token_ids=(whole[7],)),
        "string": SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop=(text[7:10],)),
    }
    core = make_core(num_blocks=100)
    for name, sampling in cases.items():
        core.add(Request(name, (5, 6), sampling))
    events, _ = run_all(core)
    first = whole.index(whole[7])
    assert text_of(events["id"]) == text[:first]
    assert text_of(events["string"]) == text[: text.index(text[7:10])]
    assert {e[-1].finish_reason for e in events.values()} == {"stop"}


def test_stats_count_tokens_and_blocks():
    core = make_core(num_blocks=50)
    core.add(Request("r", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)))
    core.step()
    during = core.stats()
    assert during.running == 1 and during.blocks_free < 50 and during.prompt_tokens_total == 3
    run_all(core)
    after = core.stats()
    assert after.running == 0 and after.blocks_free == 50 and after.generated_tokens_total == 6
