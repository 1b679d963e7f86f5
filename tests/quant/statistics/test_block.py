"""Statistics of calibration against transformers' own hidden states, hooked in its own modules."""

import pytest
import torch
from tiny_runs import LAYERS, VOCAB, write_runnable

from calib_data.blocks import CalibrationSet
from convert.errors import InputError
from convert.folder.output import OutputFolder
from convert.readers import open_checkpoint
from quant.config import QuantConfig
from quant.progress import Progress
from quant.session import Session
from quant.statistics.block import BlockStatistics, from_upper_triangle, load_statistics, upper_triangle
from quant.statistics.calibrate import block_file, calibrate, open_statistics

TOKENS = torch.randint(0, VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, one_thread):
    """(model folder, statistics folder) of the tiny model on TOKENS."""
    place = tmp_path_factory.mktemp("statistics")
    model = write_runnable(place / "model")
    ckpt = open_checkpoint(model)
    with OutputFolder.begin(place / "stats", {"a": 1}, layout="root") as folder, Progress("test") as progress:
        session = Session(ckpt, torch.device("cpu"), torch.float32, progress)
        calibrate(session, QuantConfig(), CalibrationSet(TOKENS, {}), folder)
    return model, place / "stats"


@pytest.fixture(scope="module")
def theirs(saved):
    """Inputs of the linears and keys and values of every layer, from transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        saved[0], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    seen = {}

    def hook(name):
        def keep(module, args):
            seen[name] = args[0].detach().flatten(0, -2)

        return keep

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(hook((i, "attn_in")))
        layer.self_attn.o_proj.register_forward_pre_hook(hook((i, "o_in")))
        layer.mlp.up_proj.register_forward_pre_hook(hook((i, "mlp_in")))
        layer.mlp.down_proj.register_forward_pre_hook(hook((i, "down_in")))
    with torch.no_grad():
        cache = model(TOKENS, use_cache=True).past_key_values
    for i in range(LAYERS):
        seen[i, "k"], seen[i, "v"] = (
            cache.layers[i].keys,
            cache.layers[i].values,
        )  # (S, Hkv, L, D), after RoPE
    return seen


@pytest.mark.parametrize("name", ["attn_in", "o_in", "mlp_in", "down_in"])
def test_gram_mean_and_maximum_are_those_of_the_reference(saved, theirs, name):
    for layer in range(LAYERS):
        ours = load_statistics(saved[1] / block_file(layer))
        x = theirs[layer, name].double()
        gram = ours.inputs[name].gram.double() * TOKENS.numel()
        # float32 sums over 72 rows, and float32 activations that went through up to four layers
        assert torch.allclose(gram, x.T @ x, rtol=1e-3, atol=1e-3 * float((x.T @ x).abs().max()))
        assert torch.equal(gram, gram.T)
        assert torch.allclose(ours.inputs[name].mean_abs.double(), x.abs().mean(0), rtol=1e-3, atol=1e-5)
        assert ours.inputs[name].tokens == TOKENS.numel()


@pytest.mark.parametrize("name", ["k", "v"])
def test_ranges_are_those_after_rope(saved, theirs, name):
    for layer in range(LAYERS):
        low, high = load_statistics(saved[1] / block_file(layer)).ranges[name]
        reference = theirs[layer, name].transpose(1, 2).flatten(0, 1)  # (tokens, Hkv, D)
        assert torch.allclose(low, reference.amin(0), atol=1e-4)
        assert torch.allclose(high, reference.amax(0), atol=1e-4)


def test_the_upper_triangle_by_hand():
    square = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    assert upper_triangle(square).tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(from_upper_triangle(torch.tensor([1.0, 2, 3, 4, 5, 6]), 3), square)


def test_statistics_of_another_model_are_refused(saved, tmp_path):
    other = open_checkpoint(write_runnable(tmp_path / "other", seed=99))
    with pytest.raises(InputError, match="statistics of another model"):
        open_statistics(saved[1], other)
    with pytest.raises(InputError, match="no folder of statistics"):
        open_statistics(saved[0], other)


def test_unfinished_statistics_are_refused(saved, tmp_path):
    ckpt = open_checkpoint(saved[0])
    OutputFolder.begin(tmp_path / "begun", {"a": 1}, layout="root").close()
    with pytest.raises(InputError, match="unfinished"):
        open_statistics(tmp_path / "begun", ckpt)


def test_rows_that_are_not_finite_are_left_out_and_counted():
    block = BlockStatistics(0)
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    bad = x.clone()
    bad[3, 2], bad[7, 0] = torch.nan, torch.inf
    block.tap("attn_in", bad)
    good = x[[i for i in range(40) if i not in (3, 7)]]
    part = block.inputs["attn_in"]
    assert torch.allclose(part.gram_sum, good.T @ good, rtol=1e-5)
    assert part.excluded == 2 and part.tokens == 38
    assert torch.allclose(block.tensors()["attn_in.mean_abs"], good.abs().mean(0), rtol=1e-5)
    assert block.check() == ["layer 0, attn_in: 2 of 40 tokens hold NaN or Inf: left out."]
    block.tap("attn_in", torch.full((10, 8), torch.nan))
    with pytest.raises(
        InputError, match="12 of 50 tokens hold NaN or Inf in their activations, more than 10%"
    ):
        block.check()
