"""The engine as a GPU runs it: CUDA graphs, steps in flight, int4 weights and int8 pages, against a float32 pass on the CPU.

The model is tiny and random (vocabulary 1000, logits of deviation about 1). In fp16 a greedy token may differ from the one of another
batch only where two logits are closer than the rounding of the products, which these tests bound by `TIE`.
"""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.api import Request, SamplingParams
from engine.config import EngineConfig
from engine.loading import make_core
from engine.model.forward import Model, causal_attend
from engine.model.random_weights import random_checkpoint
from engine.serving.core import EngineCore
from engine.serving.sampled import PendingSample
from engine.serving.sampling import Sampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TIE = 0.05
CONFIG = EngineConfig(
    device="cuda",
    max_batch=16,
    max_step_tokens=128,
    context_length=512,
    graph_batches=(1, 4, 8),
    warm_up=False,
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def engine(weights: str = "fp16", **options: object) -> EngineCore:
    ckpt = random_checkpoint("tiny", torch.device("cuda", 0), weights=weights, seed=1)
    return make_core(ckpt, replace(CONFIG, **options))


def reference(weights: str) -> Model:
    ckpt = random_checkpoint("tiny", torch.device("cuda", 0), weights=weights, seed=1)
    return Model.from_checkpoint(ckpt, "cpu", torch.float32)


def full_logits(model: Model, ids: list[int]) -> Tensor:
    attend = causal_attend(1, len(ids), model.config)
    return model(torch.tensor(ids), torch.arange(len(ids)), attend)


def generate(core: EngineCore, requests: list[Request]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        core.add(request)
    while core.has_work:
        for event in core.step():
            assert event.error is None, event.error
            tokens[event.request_id].extend(event.token_ids)
    assert core.blocks.free == core.blocks.total
    return tokens


def prompts(count: int, longest: int = 300) -> list[Request]:
    rng = random.Random(count)
    return [
        Request(f"r{i}", tuple(rng.choices(range(1000), k=rng.randint(1, longest))), GREEDY)
        for i in range(count)
    ]


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize(
    ("weights", "kv_bits", "limit"), [("fp16", 16, 0.01), ("int4", 16, 0.01), ("int4", 8, 0.03)]
)
def test_logits_of_each_step_match_a_float32_pass_on_the_cpu(weights, kv_bits, limit, cuda_graphs):
    """Relative Frobenius error over the steps of one request; chunks of 128 tokens, then decode steps."""
    core = engine(weights, kv_bits=kv_bits, cuda_graphs=cuda_graphs)
    seen: list[Tensor] = []
    sample = core.runner.sampler.sample

    def watched(logits, *rest, **named):
        seen.append(logits[0].clone())
        return sample(logits, *rest, **named)

    core.runner.sampler.sample = watched
    request = prompts(1)[0]
    request = replace(request, prompt_ids=tuple(range(200)))
    (tokens,) = generate(core, [request]).values()
    expected = full_logits(reference(weights), [*request.prompt_ids, *tokens[:-1]])[199:]
    got = torch.stack(seen[: len(expected)]).cpu()
    assert float((got - expected).norm() / expected.norm()) < limit
    core.close()


@pytest.mark.parametrize(("weights", "kv_bits"), [("fp16", 16), ("int4", 8)])
def test_tokens_under_batching_differ_from_those_alone_at_near_ties_only(weights, kv_bits):
    """I91 on a GPU: more requests than the largest graph holds, chunks shared by several prompts."""
    batch = prompts(24)
    core = engine(weights, kv_bits=kv_bits)
    together = generate(core, batch)
    apart = {request.id: generate(core, [request])[request.id] for request in batch}
    core.close()
    model = reference(weights)
    equal = 0
    for request in batch:
        a, b = together[request.id], apart[request.id]
        place = next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), None)
        equal += place is None
        if place is not None and kv_bits == 16:
            logits = full_logits(model, [*request.prompt_ids, *a[:place]])[-1]
            assert abs(float(logits[a[place]] - logits[b[place]])) < TIE
    assert equal >= 0.7 * len(batch)


def test_graphs_and_eager_steps_give_the_same_tokens():
    batch = prompts(6, longest=60)
    tokens = [generate(engine("int4", kv_bits=8, cuda_graphs=graphs), batch) for graphs in (True, False)]
    same = sum(tokens[0][request.id] == tokens[1][request.id] for request in batch)
    assert same >= 4  # a bucket of 8 may take another tile than a batch of 6


def test_the_same_run_gives_the_same_tokens():
    batch = [
        replace(r, sampling=replace(GREEDY, temperature=0.8, top_p=0.9, seed=i))
        for i, r in enumerate(prompts(8))
    ]
    assert generate(engine("int4", kv_bits=8), batch) == generate(engine("int4", kv_bits=8), batch)


def test_a_captured_step_whose_sampling_fails_is_taken_again_from_the_same_tokens(monkeypatch):
    """A replay writes the likeliest tokens over its inputs: where drawing fails behind it, the halves need these back."""
    drawn = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=24, ignore_eos=True)
    batch = [replace(r, sampling=replace(drawn, seed=i)) for i, r in enumerate(prompts(4, longest=60))]
    apart = engine()
    expected = {r.id: generate(apart, [r])[r.id] for r in batch}  # one row a step, as the halves have

    def failing(tensors):
        if len(tensors[0]) > 1:
            raise torch.OutOfMemoryError("injected")
        return PendingSample(tensors)

    monkeypatch.setattr("engine.serving.sampling.PendingSample", failing)
    got = generate(engine(), batch)
    same = sum(got[r.id] == expected[r.id] for r in batch)
    assert same >= 3  # prompts share their chunks, and round otherwise


def test_capturing_all_buckets_keeps_one_workspace_of_the_libraries():
    core = engine(max_batch=64, graph_batches=tuple(range(4, 65, 4)))
    graphs = core.runner._graphs
    with torch.inference_mode():
        graphs._capture(4)
    before = torch.cuda.memory_allocated()
    graphs.warm_up()
    kept = 15 * (64 * 1000 * 4 + 2**21)  # logits of each bucket, and what allocations are rounded to
    assert torch.cuda.memory_allocated() - before < kept
    core.close()


def test_random_aborts_and_preemptions_leak_nothing():
    core = engine("int4", kv_bits=8, cache_bytes=2 * 2 * 64 * (2 * 64 + 8) * 40)  # 40 blocks
    rng, alive = random.Random(0), set()
    requests = iter(prompts(150, longest=150))
    done = 0
    while done < 150:
        for _ in range(rng.choice([0, 1, 2])):
            request = next(requests, None)
            if request is not None:
                core.add(request)
                alive.add(request.id)
        if alive and rng.random() < 0.1:
            core.abort(rng.choice(sorted(alive)))
        for event in core.step():
            assert event.error is None, event.error
            if event.finish_reason is not None:
                alive.remove(event.request_id)
                done += 1
    assert core.blocks.free == core.blocks.total and not core.scheduler.running
    core.close()


def test_sampling_on_the_gpu_draws_what_the_cpu_draws():
    kinds = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=20),
        SamplingParams(temperature=1.2, top_p=0.8, repetition_penalty=1.2),
        SamplingParams(temperature=0.9, min_p=0.05, logit_bias=((3, 1.0),), presence_penalty=0.3, logprobs=2),
    ]
    logits = torch.randn(20, 64, 1000, generator=torch.Generator().manual_seed(0)) * 2
    drawn = []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        sampler = Sampler(64, 1000, device)
        for row in range(64):
            sampler.join(row, kinds[row % 4], row, (1, 2), ())
        rows, index = tuple(range(64)), torch.arange(64, device=device)
        drawn.append([sampler.sample(step.to(device), rows, index).wait().token_ids for step in logits])
    pairs = [pair for a, b in zip(*drawn, strict=True) for pair in zip(a, b, strict=True)]
    # A token may differ where the random number falls within rounding of a border; then penalties of that row differ later.
    assert sum(a == b for a, b in pairs) >= 0.995 * len(pairs)


def test_running_out_of_memory_halves_the_step_and_answers_everything():
    """E48 with the real allocator: a chunk whose activations do not fit under the cap is cut until it does."""
    core = engine("fp16", max_step_tokens=32768, context_length=32768, max_batch=2, cuda_graphs=False)
    request = Request("r", tuple(i % 1000 for i in range(24000)), replace(GREEDY, max_tokens=4))
    generate(core, [request])  # compiles, and takes its workspaces
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    generate(core, [request])
    needed = torch.cuda.max_memory_allocated() - resting
    steps: list[int] = []
    run = core.runner.run

    def watched(plan):
        steps.append(plan.tokens)
        return run(plan)

    core.runner.run = watched
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    # Of what the step needs 0.7 are there: the holes in what is reserved already, left by other tests, count too. It has to be
    # large beside the 20 MiB that the allocator takes at a time.
    torch.cuda.set_per_process_memory_fraction((resting + 0.7 * needed) / total)
    try:
        assert len(generate(core, [request])["r"]) == 4
        assert len(steps) > 4 and steps[0] == 24000 and steps[1] == 12000
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    core.close()
