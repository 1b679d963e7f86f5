"""The runner and the paged cache on tiny random models: batching against one request alone, int8 KV, chunks, preemption."""

import gc
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from convert.config import ModelConfig, RopeScaling
from convert.errors import InputError, ResourceError
from engine import loading
from engine.api import Request, SamplingParams
from engine.config import EngineConfig
from engine.loading import gathered_bytes, make_core, use_device
from engine.model.forward import Model, causal_attend
from engine.model.random_weights import SHAPES, RandomCheckpoint, random_checkpoint
from engine.serving.core import EngineCore
from engine.serving.sampled import PendingSample
from engine.serving.scheduler import Segment, StepPlan
from engine.serving.warm_up import warm_up_plans

CPU = torch.device("cpu")
TINY = replace(SHAPES["tiny"], hidden_size=64, intermediate_size=96, num_heads=4, head_dim=16, vocab_size=300)
WINDOW = replace(TINY, family="mistral", sliding_window=9)
DYNAMIC = replace(TINY, max_position=32, rope_scaling=RopeScaling("dynamic", 4.0, 32))


def checkpoint(config: ModelConfig = TINY) -> RandomCheckpoint:
    ckpt = random_checkpoint("tiny", CPU, seed=3)
    ckpt.config = config
    return ckpt


def engine(config: ModelConfig = TINY, **options) -> EngineCore:
    settings = {
        "device": "cpu",
        "block_size": 16,
        "max_batch": 8,
        "max_step_tokens": 32,
        "context_length": 128,
    }
    return make_core(checkpoint(config), EngineConfig(**{**settings, **options}))


def generate(core: EngineCore, requests: list[Request]) -> dict[str, tuple[int, ...]]:
    for request in requests:
        core.add(request)
    tokens: dict[str, tuple[int, ...]] = {request.id: () for request in requests}
    while core.has_work:
        for event in core.step():
            assert event.error is None, event.error
            tokens[event.request_id] += event.token_ids
    assert core.blocks.free == core.blocks.total
    return tokens


def requests(count: int, sampling: SamplingParams, longest: int = 60) -> list[Request]:
    generator = torch.Generator().manual_seed(count)
    out = []
    for i in range(count):
        length = int(torch.randint(1, longest, (1,), generator=generator))
        prompt = tuple(torch.randint(0, 300, (length,), generator=generator).tolist())
        budget = int(torch.randint(1, sampling.max_tokens + 1, (1,), generator=generator))
        out.append(Request(f"r{i}", prompt, replace(sampling, max_tokens=budget, seed=i)))
    return out


GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def test_a_named_gpu_becomes_the_device_of_triton(monkeypatch):
    """Triton launches on the current device: on another one than its tensors', a kernel is not ordered behind what made them."""
    chosen = []
    monkeypatch.setattr("engine.loading.resolve_device", torch.device)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert use_device("cuda:1") == torch.device("cuda", 1) and use_device("cpu") == CPU
    assert chosen == [torch.device("cuda", 1)]


def test_a_closed_runner_holds_no_model_and_no_cache():
    """Whoever keeps the engine's name, as a loop over contenders does, must not keep its memory."""
    core = engine()
    held = [weakref.ref(part) for part in (core.runner.model, core.runner.cache, core.runner.sampler)]
    generate(core, requests(2, GREEDY))
    core.close()
    gc.collect()
    assert [part() for part in held] == [None] * 3


@pytest.mark.parametrize("config", [TINY, WINDOW, DYNAMIC], ids=["full", "window", "dynamic-rope"])
def test_tabulated_angles_give_the_same_tokens(config):
    """Positions run over several pages; scalings that depend on the length are left alone."""
    plain, tabulated = engine(config), engine(config)
    tabulated.runner.model.tabulate_angles(128)
    batch = requests(4, GREEDY)
    assert generate(plain, batch) == generate(tabulated, batch)


@pytest.mark.parametrize("config", [TINY, WINDOW, DYNAMIC], ids=["full", "window", "dynamic-rope"])
@pytest.mark.parametrize("kv_bits", [16, 8])
def test_greedy_tokens_under_batching_equal_those_alone(config, kv_bits):
    """I91, fp32 on the CPU: exactly. 32-token steps cut prompts into chunks, 12 blocks force preemptions."""
    batch = requests(14, replace(GREEDY, max_tokens=60))
    small = engine(config, kv_bits=kv_bits)
    cache_bytes = 12 * small.runner.cache.size_bytes // small.runner.num_blocks
    small = engine(config, kv_bits=kv_bits, cache_bytes=cache_bytes)
    together = generate(small, batch)
    assert small.scheduler.preemptions > 0
    apart = engine(config, kv_bits=kv_bits)
    for request in batch:
        assert generate(apart, [request])[request.id] == together[request.id]


def test_sampled_tokens_under_batching_equal_those_alone():
    batch = requests(10, SamplingParams(temperature=0.9, top_p=0.9, max_tokens=16, repetition_penalty=1.1))
    together = generate(engine(), batch)
    apart = engine()
    assert all(generate(apart, [r])[r.id] == together[r.id] for r in batch)


def test_steps_whose_sampling_fails_are_taken_again_from_the_same_state(monkeypatch):
    """Where the tokens of several rows cannot be handed out, one row at a time can: with the inputs they had."""
    batch = requests(6, SamplingParams(temperature=0.9, top_p=0.9, max_tokens=16, repetition_penalty=1.3))
    batch += [replace(r, id=f"greedy-{r.id}") for r in requests(6, GREEDY)]
    expected = generate(engine(), batch)

    def failing(tensors):
        if len(tensors[0]) > 1:
            raise torch.OutOfMemoryError("injected")
        return PendingSample(tensors)

    monkeypatch.setattr("engine.serving.sampling.PendingSample", failing)
    assert generate(engine(), batch) == expected


@pytest.mark.parametrize("config", [TINY, WINDOW], ids=["full", "window"])
def test_greedy_tokens_equal_those_of_full_forward_passes(config):
    """The reference holds no cache: each token comes from a forward pass over the whole text so far."""
    model = Model.from_checkpoint(checkpoint(config), CPU, torch.float32)
    batch = requests(4, GREEDY)
    got = generate(engine(config), batch)
    for request in batch:
        ids = list(request.prompt_ids)
        for _ in range(request.sampling.max_tokens):
            flat = torch.tensor(ids)
            logits = model(flat, torch.arange(len(ids)), causal_attend(1, len(ids), config))
            ids.append(int(logits[-1].argmax()))
        assert got[request.id] == tuple(ids[len(request.prompt_ids) :])


def test_logits_of_a_decode_step_are_bit_equal_alone_and_in_a_batch(one_thread):
    seen: dict[str, list[torch.Tensor]] = {"alone": [], "batch": []}

    def spy(core, name, row):
        sample = core.runner.sampler.sample

        def watched(logits, rows, index, **more):
            if row(rows) is not None:
                seen[name].append(logits[row(rows)].clone())
            return sample(logits, rows, index, **more)

        core.runner.sampler.sample = watched

    first, *others = requests(6, replace(GREEDY, max_tokens=12), longest=12)
    core = engine(max_step_tokens=128)
    core.add(first)
    owner = core.scheduler.waiting[0]
    spy(core, "alone", lambda rows: rows.index(owner.row) if owner.row in rows else None)
    while core.has_work:
        core.step()
    core = engine(max_step_tokens=128)
    for request in [*others[:2], first, *others[2:]]:
        core.add(request)
    mine = core.scheduler.waiting[2]
    spy(core, "batch", lambda rows: rows.index(mine.row) if mine.row in rows and not mine.finished else None)
    while core.has_work:
        core.step()
    assert len(seen["alone"]) == first.sampling.max_tokens == len(seen["batch"])
    assert all(torch.equal(a, b) for a, b in zip(seen["alone"], seen["batch"], strict=True))


def test_int8_cache_moves_logits_little():
    """Mean |difference| of log-probabilities with an int8 cache: 8 bits for each token and head, well below 0.05."""
    prompt = tuple(torch.randint(0, 300, (50,), generator=torch.Generator().manual_seed(1)).tolist())
    request = Request("r", prompt, SamplingParams(temperature=0.0, max_tokens=1, logprobs=20))
    values = []
    for kv_bits in (16, 8):
        core = engine(kv_bits=kv_bits)
        core.add(request)
        events = core.step() + core.step()
        values.append({i: v for i, _, v in events[0].logprobs[0].top})
    shared = values[0].keys() & values[1].keys()
    assert len(shared) > 15
    assert sum(abs(values[0][i] - values[1][i]) for i in shared) / len(shared) < 0.05


def test_cache_size_follows_bytes_and_context():
    core = engine(
        cache_bytes=10 * 2 * 2 * 2 * 16 * 16 * 4
    )  # ten blocks: k and v, 2 layers, 2 heads, 16 tokens of 16 fp32
    assert core.blocks.total == 10
    assert core.context_length == 128
    assert engine(cache_bytes=5 * 2 * 2 * 2 * 16 * 16 * 4).context_length == 80


def test_a_cache_without_room_for_one_block_is_refused_with_numbers():
    with pytest.raises(ResourceError, match="one block of 16 tokens"):
        engine(cache_bytes=1000)


def test_a_context_beyond_the_models_is_refused():
    with pytest.raises(InputError, match="40000"):
        engine(context_length=40000)


@pytest.mark.parametrize(
    ("blocks", "context", "most"), [(40, 64, 48), (3, 64, 48), (1, 8, 8), (40, 512, 48), (200, 7, 7)]
)
def test_steps_before_the_first_request_fit_and_leave_nothing(blocks, context, most):
    config = EngineConfig(device="cpu", max_batch=5, max_step_tokens=48, block_size=16)
    plans = list(warm_up_plans(config, blocks, context))
    assert max(plan.tokens for plan in plans) == most
    for plan in plans:
        rows = [segment.row for segment in plan.segments]
        used = [block for segment in plan.segments for block in segment.blocks]
        assert rows == list(range(len(rows))) and len(rows) <= config.max_batch
        assert len(used) == len(set(used)) and max(used) < blocks
        for segment in plan.segments:
            assert segment.length in (1, len(segment.token_ids)) and segment.start + segment.length <= context
            assert segment.start + segment.length <= len(segment.blocks) * config.block_size
    assert {sum(not s.token_ids for s in plan.segments) for plan in plans} >= ({0, 1} if blocks > 1 else {0})


def test_a_request_after_the_warm_up_is_answered_as_without():
    batch = requests(6, SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True))
    answers = []
    for warm in (False, True):
        core = engine(kv_bits=8)
        if warm:
            runner = core.runner
            runner.take_steps(warm_up_plans(core.config, runner.num_blocks, runner.context_length))
        answers.append(generate(core, batch))
        core.close()
    assert answers[0] == answers[1]


def test_room_is_left_for_the_keys_and_values_that_a_long_prompt_reads_again():
    shared = replace(SHAPES["70b"], max_position=32768)  # 8 heads of 128 behind 64
    assert gathered_bytes(shared, 1000, torch.float16) == 1000 * 2 * 8 * 128 * 2
    assert (
        gathered_bytes(replace(shared, sliding_window=4096), 1000, torch.float16) == 1000 * 2 * 72 * 128 * 2
    )
    assert (
        gathered_bytes(replace(SHAPES["7b"], sliding_window=9), 10, torch.bfloat16) == 10 * 2 * 32 * 128 * 2
    )
    assert gathered_bytes(shared, -5, torch.float16) == 0  # the context ends within the first step


def test_the_cache_leaves_that_room_on_a_gpu(monkeypatch):
    """What the cache may share out falls by what a context beyond one step has to read again, with CUDA's counters played."""
    shape = replace(SHAPES["70b"], max_position=32768)
    model = SimpleNamespace(
        device=torch.device("cuda", 0), config=shape, dtype=torch.float16, vocab_size=shape.vocab_size
    )
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (40 * 2**30, 80 * 2**30))
    monkeypatch.setattr(loading, "_largest_step", lambda *_: None)
    config = EngineConfig(device="cuda", max_step_tokens=2048, max_batch=8)
    short, long = (loading._free_bytes(model, config, length) for length in (2048, 32768))
    assert 0 < long < short and short - long == gathered_bytes(shape, 32768 - 2048, torch.float16)


@pytest.mark.parametrize(("asked", "gib"), [(None, 1), (131072, 14 / 0.9), (4096, 1), (1 << 20, 32)])
def test_the_cache_on_a_cpu_is_bounded_unless_a_context_is_asked_for(monkeypatch, caplog, asked, gib):
    """A model that states 131,072 tokens of context, 112 KiB each, on a machine with 64 GiB free."""
    monkeypatch.setattr(loading, "_available_memory", lambda: 64 * 2**30)
    shape = replace(
        SHAPES["tiny"], num_layers=28, num_kv_heads=4, head_dim=128, max_position=131072, vocab_size=300
    )
    model = SimpleNamespace(device=CPU, config=shape, dtype=torch.float32)
    config = EngineConfig(device="cpu", context_length=asked)
    context = asked or 131072
    assert loading._free_bytes(model, config, context) == math.ceil(gib * 2**30)
    assert ("longer requests are refused" in caplog.text) is (asked not in (4096, 131072))


def test_a_captured_step_whose_sampling_fails_gets_its_inputs_back(monkeypatch):
    """A replay writes over the tokens that it read: without them, the step that is taken again would begin from others."""
    core = engine()
    runner, calls = core.runner, []

    class Graphs:
        largest = 8

        def run(self, fields, tables):
            calls.append("run")
            return torch.zeros(1, 300), torch.tensor([0]), None

        def take_back(self):
            calls.append("take back")

    def fail(*_):
        raise torch.OutOfMemoryError("no room to sort")

    runner._graphs = Graphs()
    monkeypatch.setattr(runner.sampler, "sample", fail)
    plan = StepPlan((Segment(0, 3, 1, (), (0,), samples=True),), (), ())
    with pytest.raises(torch.OutOfMemoryError, match="sort"):
        runner.run(plan)
    assert calls == ["run", "take back"]
    core.close()
