"""Self-written text against greedy and sampled text of transformers' own forward pass on the same random numbers."""

import pytest
import torch
from tiny_runs import write_runnable

from convert.readers import open_checkpoint
from quant.text.generate import SelfGenerator, sample_by


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread):
    return write_runnable(tmp_path_factory.mktemp("generate") / "model")


def test_tokens_are_those_that_a_full_forward_pass_draws(folder):
    """Every token is drawn again from the logits of transformers on the whole text before it, without a cache."""
    from transformers import AutoModelForCausalLM

    prompts = torch.tensor([[5, 9], [7, 11], [100, 3]])
    steps = []
    write = SelfGenerator(
        open_checkpoint(folder), "cpu", torch.float32, lambda done, total: steps.append((done, total))
    )
    found = write(prompts, 20, 4, (256, 257, 258))
    assert torch.equal(found[:, :2], prompts) and found.shape == (3, 20)
    assert not torch.isin(found[:, 2:], torch.tensor([256, 257, 258])).any()
    assert steps[-1] == (19, 19)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    draws = torch.rand(3, 20, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits = model(found).logits
    logits[:, :, [256, 257, 258]] = -torch.inf
    probabilities = logits.double().softmax(-1)
    for sample in range(3):
        for place in range(2, 20):
            upto = probabilities[sample, place - 1].cumsum(0)
            token = int(found[sample, place])
            low = float(upto[token - 1]) if token else 0.0
            # float32 logits of two implementations differ by about 1e-6
            assert low - 1e-4 <= float(draws[sample, place]) <= float(upto[token]) + 1e-4


def test_a_sample_does_not_depend_on_its_batch(folder, monkeypatch):
    import quant.text.generate

    prompts = torch.tensor([[5], [7], [100], [30]])
    together = SelfGenerator(open_checkpoint(folder), "cpu", torch.float32)(prompts, 16, 0, ())
    monkeypatch.setattr(quant.text.generate, "CACHE_BYTES", {"cpu": 1})  # room for one sample at a time
    alone = SelfGenerator(open_checkpoint(folder), "cpu", torch.float32)(prompts, 16, 0, ())
    assert torch.equal(together, alone)


def test_a_sliding_window_is_honoured(tmp_path):
    """In a model whose queries see 4 tokens, what was written before them changes nothing."""
    folder = write_runnable(
        tmp_path / "model",
        layers=1,
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        sliding_window=4,
    )
    write = SelfGenerator(open_checkpoint(folder), "cpu", torch.float32)
    first = write(torch.tensor([[1, 50, 60, 70, 80]]), 6, 0, ())
    second = write(torch.tensor([[200, 50, 60, 70, 80]]), 6, 0, ())
    assert first[0, 5] == second[0, 5]


def test_the_inverse_of_the_distribution_by_hand():
    logits = torch.log(torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5], [0.2, 0.3, 0.5]]))
    assert sample_by(logits, torch.tensor([0.1, 0.45, 0.999])).tolist() == [0, 1, 2]
    barred = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert sample_by(barred, torch.tensor([0.0])).tolist() == [1]
    assert sample_by(barred, torch.tensor([0.99999994])).tolist() == [1]
