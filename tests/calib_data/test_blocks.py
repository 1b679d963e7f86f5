"""The sampling rule, written out again by hand, and what is said of thin text."""

import pytest
import torch

from calib_data.blocks import check_vocabulary, coverage, sample_blocks, tokens_digest
from convert.errors import InputError


def test_the_rule_of_the_recorded_figures():
    ids = torch.arange(10_000)
    blocks, _ = sample_blocks(ids, samples=5, seqlen=64, seed=3, allow_fewer=False, name="text")
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(0, 10_000 - 64 - 1, (5,), generator=generator)
    assert torch.equal(blocks, starts[:, None] + torch.arange(64))


def test_fewer_tokens_are_refused_with_the_number_that_exists():
    ids = torch.arange(1000)
    with pytest.raises(InputError, match=r"1000 tokens: 10 samples of 100, but 16 were asked .*--samples 10"):
        sample_blocks(ids, 16, 100, 0, False, "text")
    blocks, rule = sample_blocks(ids, 16, 100, 0, True, "text")
    assert blocks.shape == (10, 100) and "10 consecutive" in rule
    assert torch.equal(blocks.flatten(), ids)


def test_less_than_one_sample_is_refused_always():
    with pytest.raises(InputError, match="fewer than one sample of 100"):
        sample_blocks(torch.arange(99), 1, 100, 0, True, "text")


def test_exactly_one_sample_needs_no_random_start():
    with pytest.raises(InputError, match="--allow-fewer"):
        sample_blocks(torch.arange(100), 1, 100, 0, False, "text")
    blocks, _ = sample_blocks(torch.arange(100), 1, 100, 0, True, "text")
    assert blocks.shape == (1, 100)


def test_ids_outside_the_vocabulary():
    with pytest.raises(InputError, match=r"token id 50.* 50 entries"):
        check_vocabulary(torch.tensor([[1, 50]]), 50, "text")
    with pytest.raises(InputError, match="token id -1"):
        check_vocabulary(torch.tensor([[-1, 5]]), 50, "text")


def test_coverage_names_repeated_samples_and_a_flood_of_one_token():
    record, warnings = coverage(torch.zeros(4, 128, dtype=torch.int64), 1000)
    assert record["distinct_tokens"] == 1 and record["distinct_samples"] == 1
    assert len(warnings) == 3
    varied = torch.randint(0, 1000, (8, 256), generator=torch.Generator().manual_seed(0))
    assert coverage(varied, 1000)[1] == []


def test_digest_is_of_the_ids():
    a = torch.arange(8).view(2, 4)
    assert tokens_digest(a) == tokens_digest(a.clone()) != tokens_digest(a + 1)
