"""Zero-padding of the newer families changes shapes and not the function; what cannot be padded or split is refused by name."""

from pathlib import Path

import family_models
import pytest
import torch
from family_models import logits_of
from family_runs import VOCAB, dequantize, our_logits, their_logits, write_source

import turbomind_quant as tmq
from convert.config import ModelConfig
from convert.pad import pad_checkpoint
from convert.readers import open_checkpoint
from engine.model.forward import Model
from engine.model.parallel import shard_config

PADDABLE = [name for name in family_models.MODELS if name != "olmo2"]


@pytest.mark.parametrize("family", PADDABLE)
@torch.no_grad()
def test_a_padded_model_computes_the_same(family: str, tmp_path: Path) -> None:
    write_source(family, tmp_path / "m")
    ids = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    plain = open_checkpoint(tmp_path / "m")
    padded = pad_checkpoint(plain, 128)
    assert padded.config.hidden_size > plain.config.hidden_size
    before, after = (logits_of(Model.from_checkpoint(c, "cpu", torch.float32), ids) for c in (plain, padded))
    assert (before - after).abs().max() < 1e-4 * before.abs().max()
    tmq.quantize(tmp_path / "m", tmp_path / "q", preset="rtn", pad=True, group_size=128, device="cpu")
    dequantize(tmp_path / "q", tmp_path / "float")
    theirs = their_logits(tmp_path / "float", family_models.MODELS[family][0], ids)
    assert (our_logits(tmp_path / "q", ids) - theirs).abs().max() < 1e-3 * theirs.abs().max()
    assert tmq.verify(tmp_path / "q", source=tmp_path / "m").passed


def test_norms_over_all_heads_refuse_more_heads_and_ranks(tmp_path: Path) -> None:
    write_source("olmo2", tmp_path / "m")
    with pytest.raises(tmq.InputError, match="olmo2 model norms all heads of q and k together"):
        pad_checkpoint(open_checkpoint(tmp_path / "m"), 256)
    config: ModelConfig = open_checkpoint(tmp_path / "m").config
    with pytest.raises(tmq.InputError, match="use --tp 1"):
        shard_config(config, 0, 2)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe", "phi3"])
def test_workspaces_refuse_them_by_name(family: str, tmp_path: Path) -> None:
    write_source(family, tmp_path / "m")
    tmq.quantize(tmp_path / "m", tmp_path / "q", preset="rtn", group_size=32, device="cpu")
    with pytest.raises(tmq.InputError, match=family):
        tmq.pack(tmp_path / "q", tmp_path / "w")
    tmq.pack(tmp_path / "q", tmp_path / "ct", format="compressed-tensors")
    assert tmq.verify(tmp_path / "ct", source=tmp_path / "m").passed
    ids = torch.randint(VOCAB, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(our_logits(tmp_path / "ct", ids), our_logits(tmp_path / "q", ids))
