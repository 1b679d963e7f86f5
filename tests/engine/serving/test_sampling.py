"""Sampling against closed forms and plain loops: filters, penalties, seeds, independence of the batch."""

import numpy as np
import pytest
import torch

from engine.api import SamplingParams
from engine.serving.sampling import Sampler, uniforms

VOCAB = 50


def draw(logits, params, *, seed=0, prompt=(), output=(), steps=1):
    """Tokens of one sequence alone, the same logits at each step."""
    sampler = Sampler(4, logits.numel(), torch.device("cpu"))
    sampler.join(0, params, seed, prompt, output)
    index = torch.zeros(1, dtype=torch.int64)
    return [sampler.sample(logits[None].clone(), (0,), index).wait().token_ids[0] for _ in range(steps)]


def histogram(logits, params, draws=4000):
    sampler = Sampler(draws, logits.numel(), torch.device("cpu"))
    for row in range(draws):
        sampler.join(row, params, row, (), ())
    rows = tuple(range(draws))
    out = sampler.sample(logits.expand(draws, -1).clone(), rows, torch.arange(draws)).wait().token_ids
    return np.bincount(out, minlength=logits.numel()) / draws


def kept_by_loop(logits, params):
    """The set that filters keep, written as the papers say it, one token at a time."""
    probs = torch.softmax(logits.double() / params.temperature, -1)
    order = sorted(range(len(logits)), key=lambda i: -float(probs[i]))
    if params.top_k:
        order = order[: params.top_k]
    mass, nucleus, total = 0.0, [], float(probs[order].sum())
    for token in order:
        if mass >= params.top_p:
            break
        nucleus.append(token)
        mass += float(probs[token]) / total
    return {token for token in nucleus if probs[token] >= params.min_p * probs[order[0]]}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.6),
        SamplingParams(temperature=1.0, min_p=0.3),
        SamplingParams(temperature=0.9, top_k=12, top_p=0.7, min_p=0.05),
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-6),
        SamplingParams(temperature=1.0, top_k=10_000),
    ],
)
def test_filters_keep_the_papers_set_and_its_distribution(params):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    kept = sorted(kept_by_loop(logits, params))
    expected = np.zeros(VOCAB)
    expected[kept] = torch.softmax(logits[kept].double() / params.temperature, -1).numpy()
    seen = histogram(logits, params)
    assert set(np.nonzero(seen)[0]) <= set(kept)
    # 4,000 draws: the standard error of a frequency is below 0.008; 0.035 is over four of them.
    assert np.abs(seen - expected).max() < 0.035


def test_temperature_zero_is_the_largest_logit_and_a_tiny_one_too():
    logits = torch.tensor([0.0, 3.0, 2.9, -1.0])
    for temperature in (0.0, 1e-30):
        assert draw(logits, SamplingParams(temperature=temperature), steps=3) == [1, 1, 1]


def test_a_request_draws_the_same_tokens_alone_and_in_any_batch():
    generator = torch.Generator().manual_seed(2)
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.8, top_k=7),
        SamplingParams(temperature=1.1, top_p=0.8, repetition_penalty=1.3),
        SamplingParams(temperature=0.6, min_p=0.1, presence_penalty=0.5, logit_bias=((3, 2.0),)),
        SamplingParams(temperature=1.0, top_k=300, frequency_penalty=0.4, logprobs=3),
    ]
    logits = torch.randn(8, len(kinds), VOCAB, generator=generator)
    alone = []
    for kind, params in enumerate(kinds):
        sampler = Sampler(1, VOCAB, torch.device("cpu"))
        sampler.join(0, params, 40 + kind, (1, 2, 3), ())
        index = torch.zeros(1, dtype=torch.int64)
        alone.append(
            [
                sampler.sample(logits[t, kind : kind + 1].clone(), (0,), index).wait().token_ids[0]
                for t in range(8)
            ]
        )
    sampler = Sampler(9, VOCAB, torch.device("cpu"))
    rows = (8, 1, 5, 0, 3, 7)
    for row, (kind, params) in zip(rows, enumerate(kinds), strict=True):
        sampler.join(row, params, 40 + kind, (1, 2, 3), ())
    batched = [sampler.sample(logits[t].clone(), rows, torch.tensor(rows)).wait().token_ids for t in range(8)]
    assert [list(tokens) for tokens in zip(*batched, strict=True)] == alone


def test_a_sequence_that_comes_back_goes_on_where_it_stopped():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(temperature=1.0, frequency_penalty=1.0, repetition_penalty=1.2)
    whole = draw(logits, params, seed=5, prompt=(4, 4), steps=6)
    rest = draw(logits, params, seed=5, prompt=(4, 4), output=tuple(whole[:3]), steps=3)
    assert whole[3:] == rest


def test_penalties_follow_their_formulas():
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5])
    # Token 0 is in the prompt (2.0 / 4 = 0.5), token 1 too (-8); token 2 has been drawn twice: 1.0 / 4 - 0.3 - 2 * 0.2.
    params = SamplingParams(
        temperature=0.0, repetition_penalty=4.0, presence_penalty=0.3, frequency_penalty=0.2
    )
    sampler = Sampler(1, 4, torch.device("cpu"))
    sampler.join(0, params, 0, (0, 1), (2, 2))
    batch = sampler._prepare((0,))
    shaped = sampler._shape(logits[None].clone(), batch, torch.tensor([0]))
    torch.testing.assert_close(shaped, torch.tensor([[0.5, -8.0, 0.25 - 0.3 - 0.4, 0.5]]))


def test_presence_and_frequency_do_not_count_the_prompt():
    logits = torch.tensor([1.0, 0.9])
    assert draw(logits, SamplingParams(temperature=0.0, presence_penalty=2.0), prompt=(0, 0), steps=2) == [
        0,
        1,
    ]


def test_logit_bias_forces_and_forbids():
    logits = torch.zeros(5)
    assert draw(logits, SamplingParams(temperature=1.0, logit_bias=((3, 100.0),)), steps=4) == [3] * 4
    assert 0 not in draw(torch.tensor([9.0, 0, 0, 0, 0]), SamplingParams(logit_bias=((0, -100.0),)), steps=9)


def test_logprobs_are_those_of_the_models_distribution():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(6))
    sampler = Sampler(2, VOCAB, torch.device("cpu"))
    sampler.join(0, SamplingParams(temperature=0.3, top_k=2, logprobs=4), 1, (), ())
    sampler.join(1, SamplingParams(temperature=0.0), 1, (), ())
    out = sampler.sample(logits.expand(2, -1).clone(), (0, 1), torch.arange(2)).wait()
    reference = torch.log_softmax(logits, -1)
    assert out.logprobs is not None and out.top_ids is not None and out.top_logprobs is not None
    assert out.logprobs[0] == pytest.approx(float(reference[out.token_ids[0]]))
    assert out.top_ids[0] == reference.topk(4).indices.tolist()
    assert out.top_logprobs[0] == pytest.approx(reference.topk(4).values.tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(top_p=0.5, logprobs=1)])
def test_a_row_that_is_not_finite_is_told_and_leaves_the_others_alone(bad, params):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(7))
    expected = draw(logits[2], params, seed=2)[0]
    logits[1, 7] = bad
    sampler = Sampler(3, VOCAB, torch.device("cpu"))
    for row in range(3):
        sampler.join(row, params, row, (), ())
    out = sampler.sample(logits, (0, 1, 2), torch.arange(3)).wait()
    assert out.finite == [True, False, True]
    assert out.token_ids[2] == expected


def test_uniforms_are_uniform_and_depend_on_both_numbers():
    seeds = np.arange(20_000, dtype=np.uint64)
    u = uniforms(seeds, np.zeros_like(seeds))
    v = uniforms(np.zeros_like(seeds), seeds)
    assert u.min() >= 0.0 and u.max() < 1.0
    # 20,000 uniform numbers in 20 bins: chi-squared with 19 degrees of freedom is above 50 once in 10,000 times.
    for sample in (u, v):
        counts = np.histogram(sample, bins=20, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 50
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
