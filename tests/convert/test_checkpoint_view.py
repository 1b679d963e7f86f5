"""Views of a checkpoint: what they change is theirs, also where files are read linear by linear; all else is the inner one's."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import write_runnable

from convert.checkpoint import BlockWeights
from convert.checkpoint_view import CheckpointView, FirstBlocks, WithFinalNorm
from convert.errors import InputError
from convert.kv_parameters import find_kv_parameters
from convert.readers import open_checkpoint


class Doubled(CheckpointView):
    """Every linear twice as large."""

    def block(self, index: int) -> BlockWeights:
        block = self.inner.block(index)
        linears = {role: replace(part, weight=part.weight * 2) for role, part in block.linears.items()}
        return replace(block, linears=linears)


@pytest.fixture
def model(tmp_path):
    return open_checkpoint(write_runnable(tmp_path / "model", layers=3))


def test_linears_as_files_hold_them_are_those_of_the_view(model) -> None:
    view = Doubled(model, notes=["doubled"])
    stored = view.stored_linears(1, ["up"])["up"]["weight"]
    assert torch.equal(stored, 2 * model.block(1).linears["up"].weight.t())
    assert torch.equal(view.norms(1)["attn_norm"], model.norms(1)["attn_norm"])
    assert torch.equal(view.embedding(), model.embedding()) and view.weight_files() == model.weight_files()
    assert view.notes == [*model.notes, "doubled"] and view.digest() == model.digest()


def test_a_cut_checkpoint_and_one_with_another_norm(model) -> None:
    cut = FirstBlocks(model, 2)
    assert cut.config.num_layers == 2 and model.config.num_layers == 3
    assert torch.equal(cut.block(1).linears["q"].weight, model.block(1).linears["q"].weight)
    norm = torch.full((model.config.hidden_size,), 2.0)
    view = WithFinalNorm(cut, norm)
    assert torch.equal(view.final_norm(), norm) and view.config is cut.config
    assert torch.equal(view.lm_head(), model.lm_head())


def test_a_view_watches_the_files_of_the_inner_one(model) -> None:
    view = WithFinalNorm(model, torch.ones(model.config.hidden_size))
    view.check_unchanged()
    path = model.weight_files()[0]
    path.write_bytes(path.read_bytes()[:-2] + b"\0\1")
    with pytest.raises(InputError, match=path.name):
        view.check_unchanged()


def test_kv_parameters_are_found_in_a_checkpoint_and_in_a_workspace(tmp_path) -> None:
    assert find_kv_parameters(tmp_path) is None
    (tmp_path / "kv_params.safetensors").write_bytes(b"")
    assert find_kv_parameters(tmp_path) == tmp_path / "kv_params.safetensors"
    (tmp_path / "tmq").mkdir()
    (tmp_path / "tmq/kv_params.safetensors").write_bytes(b"")
    assert find_kv_parameters(tmp_path) == tmp_path / "tmq/kv_params.safetensors"
