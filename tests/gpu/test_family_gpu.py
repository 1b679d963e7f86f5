"""Newer families on the GPU: logits in float16 against float32 on the CPU, and answers through the paged cache and its kernels."""

from pathlib import Path

import family_models
import pytest
import torch
from family_models import logits_of

from convert.readers import open_checkpoint
from engine.api import Request, SamplingParams
from engine.config import EngineConfig
from engine.loading import make_core
from engine.model.forward import Model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# head sizes that the kernels take; phi3 and others derive theirs from the hidden size
SIZES = {"hidden_size": 256, "head_dim": 64}
PHI3 = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.02 * i for i in range(24)],
    "long_factor": [1.5 + 0.1 * i for i in range(24)],
}


def save(family: str, folder: Path) -> None:
    changes = SIZES | ({"rope_parameters": PHI3} if family == "phi3" else {})
    family_models.save_model(family, folder, **changes)


def engine_tokens(folder: Path, device: str, kv_bits: int) -> list[tuple[int, ...]]:
    config = EngineConfig(
        device=device, max_batch=4, max_step_tokens=16, context_length=128, cache_bytes=2**26, kv_bits=kv_bits
    )
    core = make_core(open_checkpoint(folder), config)
    generator = torch.Generator().manual_seed(1)
    found: dict[str, tuple[int, ...]] = {}
    for length in (30, 41, 45):
        prompt = tuple(torch.randint(160, (length,), generator=generator).tolist())
        core.add(
            Request(f"r{length}", prompt, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
        )
        found[f"r{length}"] = ()
    while core.has_work:
        for event in core.step():
            assert event.error is None, event.error
            found[event.request_id] += event.token_ids
    return list(found.values())


@pytest.mark.parametrize("family", family_models.MODELS)
@torch.no_grad()
def test_logits_and_answers(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / "m")
    ckpt = open_checkpoint(tmp_path / "m")
    ids = torch.randint(160, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = logits_of(Model.from_checkpoint(ckpt, "cpu", torch.float32), ids).double()
    model = Model.from_checkpoint(ckpt, "cuda", torch.float16)
    out = torch.cat([logits_of(model, row[None].cuda()) for row in ids]).double().cpu()
    # a token may go to another expert where two are equally likely in float16: the median of the tokens
    apart = (out - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(apart.median()) < 1e-2
    theirs = engine_tokens(tmp_path / "m", "cpu", 16)
    for kv_bits in (16, 8):
        ours = engine_tokens(tmp_path / "m", "cuda", kv_bits)
        same = sum(a[:2] == b[:2] for a, b in zip(ours, theirs, strict=True))
        assert same >= 2, (kv_bits, ours, theirs)  # of three answers, the first tokens
