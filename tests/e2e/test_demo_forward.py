"""The forward pass on a real model: logits and greedy text of the demo model equal those of transformers, float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from convert.readers import open_checkpoint
from engine.measure.perplexity import EvalTokens, perplexity
from engine.model.forward import Model, causal_attend

pytestmark = pytest.mark.e2e
PROMPT = "The lighthouse keeper wrote in his log that the winter of 1904 had been"


@pytest.fixture(scope="module")
def ours(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    ckpt = open_checkpoint(demo_model, cache_dir=tmp_path_factory.mktemp("cache"))
    return Model.from_checkpoint(ckpt, "cpu", torch.float32), ckpt.tokenizer_dir


@pytest.fixture(scope="module")
def reference(ours: tuple[Model, Path]) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(ours[1], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompt(ours: tuple[Model, Path]) -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(ours[1])
    return torch.tensor(tokenizer(PROMPT, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module")
@torch.no_grad()
def text(reference: Any, prompt: Tensor) -> Tensor:
    """The prompt and 64 greedy tokens of transformers."""
    ids: Tensor = reference.generate(prompt[None], max_new_tokens=64, do_sample=False, eos_token_id=None)[0]
    assert len(ids) == len(prompt) + 64
    return ids


@torch.no_grad()
def test_logits_and_greedy_text(
    ours: tuple[Model, Path], reference: Any, prompt: Tensor, text: Tensor
) -> None:
    model, _ = ours
    logits = model(text, torch.arange(len(text)), causal_attend(1, len(text), model.config))
    assert (logits - reference(text[None]).logits[0]).abs().max() < 1e-4
    # what it would have said after each of those tokens is what comes next: the same greedy text
    assert torch.equal(logits[len(prompt) - 1 : -1].argmax(-1), text[len(prompt) :])


@torch.no_grad()
def test_perplexity_equals_the_loss_of_transformers(
    ours: tuple[Model, Path], reference: Any, text: Tensor
) -> None:
    """`labels` make transformers compute the mean loss of the shifted positions, window by window."""
    result = perplexity(ours[0], EvalTokens(text, False, "generated", "t", "k"), 32)
    losses = [reference(w[None], labels=w[None]).loss.item() for w in text[:64].view(2, 32)]
    assert result.nll == pytest.approx(losses, rel=1e-4)
