"""Newer families behind the paged cache: greedy answers of a batch are those that transformers writes for each prompt alone."""

from pathlib import Path

import family_models
import pytest
import torch

from convert.readers import open_checkpoint
from engine.api import Request, SamplingParams
from engine.config import EngineConfig
from engine.loading import make_core

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("family", family_models.MODELS)
def test_answers_of_a_batch_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    reference = family_models.save_model(family, tmp_path / "m")
    config = EngineConfig(
        device="cpu", block_size=16, max_batch=8, max_step_tokens=16, context_length=128, cache_bytes=2**24
    )
    core = make_core(open_checkpoint(tmp_path / "m"), config)
    generator = torch.Generator().manual_seed(1)
    # longrope stays on one side of its original context of 24 tokens: a cache keeps the angles that it has
    lengths = (5, 12, 30, 41) if family == "phi3" else (3, 17, 30, 41)
    prompts = {f"r{n}": tuple(torch.randint(160, (n,), generator=generator).tolist()) for n in lengths}
    found: dict[str, tuple[int, ...]] = {name: () for name in prompts}
    for name, prompt in prompts.items():
        core.add(Request(name, prompt, GREEDY))
    while core.has_work:
        for event in core.step():
            assert event.error is None, event.error
            found[event.request_id] += event.token_ids
    for name, prompt in prompts.items():
        ids = torch.tensor([prompt])
        wanted = reference.generate(ids, max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert found[name] == tuple(wanted.tolist()), name
