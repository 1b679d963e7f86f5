"""The batched CPU decode attention against the reference that takes one sequence at a time."""

import pytest
import torch

from kernels.attention.cpu import PagedDecode
from kernels.attention.paged import decode_attention_reference
from kernels.kv.int8 import store_kv
from kernels.kv.pages import StaticKV, allocate_cache

LENGTHS = [1, 16, 17, 63, 40]


def filled(kind: str):
    static = None
    if kind == "static":
        ones = torch.ones(2)
        static = StaticKV(ones * 0.03, ones * 0.1, ones * 0.03, ones * -0.1)
    cache = allocate_cache(
        24, 2, 8, 16 if kind == "float" else 8, torch.float32, "cpu", block_size=16, static=static
    )
    generator = torch.Generator().manual_seed(0)
    slots = torch.arange(24 * 16)
    store_kv(cache, *(torch.randn(len(slots), 2, 8, generator=generator) for _ in range(2)), slots)
    tables = torch.randperm(24, generator=generator)[:20].view(5, 4).int()
    return cache, tables, torch.randn(5, 6, 8, generator=generator)


@pytest.mark.parametrize("kind", ["float", "dynamic", "static"])
@pytest.mark.parametrize("window", [None, 5, 20, 100])
def test_equals_the_reference(kind, window):
    cache, tables, q = filled(kind)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    expected = decode_attention_reference(q, cache, tables, lengths, 0.3, window)
    got = PagedDecode(tables, lengths, 16, window)(q, cache, 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # float32 sums in another order


def test_bits_do_not_depend_on_the_batch():
    cache, tables, q = filled("float")
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    together = PagedDecode(tables, lengths, 16)(q, cache, 0.3)
    for i in range(5):
        alone = PagedDecode(tables[i : i + 1], lengths[i : i + 1], 16)(q[i : i + 1], cache, 0.3)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("kind", ["float", "dynamic"])
@pytest.mark.parametrize(
    "pages", [[5, 6, 7, 8], [2, 5, 9, 20], [8, 7, 6, 5]], ids=["run", "gaps", "backwards"]
)
def test_pages_in_a_row_and_others(kind, pages):
    cache, _, q = filled(kind)
    tables, lengths = torch.tensor([pages], dtype=torch.int32), torch.tensor([63], dtype=torch.int32)
    before = cache.k.clone(), cache.v.clone()
    got = PagedDecode(tables, lengths, 16)(q[:1], cache, 0.3)
    expected = decode_attention_reference(q[:1], cache, tables, lengths, 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(cache.k, before[0]) and torch.equal(cache.v, before[1])  # read in place, not written
