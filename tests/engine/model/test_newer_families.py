"""Newer families against transformers: a folder that it wrote, read by us, gives its logits and its greedy text (float32)."""

from pathlib import Path
from typing import Any

import family_models
import pytest
import torch
from family_models import TOLERANCE, logits_of, read
from torch import Tensor

from engine.model.forward import Model, causal_attend


def greedy(model: Model, prompt: Tensor, count: int) -> list[int]:
    """`count` tokens after prompt (L,), each from a full pass with the angles that decoding with a cache would have."""
    ids = prompt
    for _ in range(count):
        length = len(ids)
        lengths = torch.full((length,), len(prompt))
        attend = causal_attend(1, length, model.config)
        out = model(ids, torch.arange(length), attend, lengths, torch.tensor([length - 1]))
        ids = torch.cat((ids, out.argmax(-1)))
    return ids[len(prompt) :].tolist()


@pytest.mark.parametrize("family", family_models.MODELS)
@torch.no_grad()
def test_logits_and_greedy_text_equal_transformers(family: str, tmp_path: Path) -> None:
    reference = family_models.save_model(family, tmp_path / "m")
    ours = read(tmp_path / "m")
    ids = torch.randint(160, (2, 40), generator=torch.Generator().manual_seed(1))
    expected: Tensor = reference(ids).logits
    assert expected.std() > 0.3  # a model that says nothing would agree with everything
    assert (logits_of(ours, ids) - expected).abs().max() < TOLERANCE
    short = ids[:, :20]  # within the original context of longrope
    assert (logits_of(ours, short) - reference(short).logits).abs().max() < TOLERANCE
    # where longrope leaves its original context, transformers computes the whole text again; a cache keeps what it has
    prompt = ids[0, :30] if family == "phi3" else ids[0, :12]
    text: Any = reference.generate(prompt[None], max_new_tokens=32, do_sample=False)[
        0, len(prompt) :
    ].tolist()
    assert greedy(ours, prompt, 32) == text
