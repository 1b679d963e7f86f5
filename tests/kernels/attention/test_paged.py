"""Paged attention: the torch reference against plain softmax attention, the decode kernel (in the interpreter) against it."""

import collections
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention import launch as attention_triton
from kernels.attention.launch import launch_decode
from kernels.attention.operands import NewTokens
from kernels.attention.paged import (
    DecodeWorkspace,
    decode_attention,
    decode_attention_reference,
    prefill_attention,
    rope_decode_attention,
)
from kernels.attention.units import DecodeConfig, max_units, share, share_tiles
from kernels.kv.int8 import store_kv
from kernels.kv.pages import KVCache, StaticKV, allocate_cache

PAGE = 16
CONFIG = DecodeConfig(tile=16, num_warps=4, num_stages=2, per_sm=2)


def filled_cache(
    kind: str, lens: list[int], num_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float16
) -> tuple[KVCache, Tensor, list[tuple[Tensor, Tensor]]]:
    """A cache whose unused slots hold NaN where the format can, block tables in a shuffled order with -1 past the end, and
    the exact keys and values of each sequence (L, Hkv, D)."""
    torch.manual_seed(0)
    blocks = max(-(-n // PAGE) for n in lens) + 1
    static = None
    if kind == "static":
        static = StaticKV(
            *(
                torch.linspace(a, b, num_kv_heads)
                for a, b in ((0.02, 0.03), (0, 0.1), (0.03, 0.02), (-0.2, 0))
            )
        )
    cache = allocate_cache(
        len(lens) * blocks, num_kv_heads, head_dim, 16 if kind == "float" else 8, dtype, "cpu", block_size=PAGE, static=static
    )  # fmt: skip
    for part in (cache.k, cache.v) if kind == "float" else () if cache.params is None else (cache.params,):
        part.fill_(float("nan"))
    order = torch.randperm(len(lens) * blocks).view(len(lens), blocks).int()
    tables = torch.full_like(order, -1)
    exact = []
    for row, length in enumerate(lens):
        used = -(-length // PAGE)
        tables[row, :used] = order[row, :used]
        k, v = torch.randn(length, num_kv_heads, head_dim), torch.randn(length, num_kv_heads, head_dim) + 0.3
        token = torch.arange(length)
        store_kv(cache, k, v, tables[row].long()[token // PAGE] * PAGE + token % PAGE)
        exact.append((k, v))
    return cache, tables, exact


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("window", [None, 6])
def test_reference_is_softmax_attention(window: int | None):
    cache, tables, exact = filled_cache("float", [21, 1], 2, 32, torch.float32)
    q = torch.randn(2, 4, 32)
    ours = decode_attention(q, cache, tables, torch.tensor([21, 1], dtype=torch.int32), 0.3, window)
    for row, (k, v) in enumerate(exact):
        seen = slice(None) if window is None else slice(max(0, k.shape[0] - window), None)
        for head in range(4):
            weights = (k[seen, head // 2] @ q[row, head] * 0.3).softmax(0)
            assert torch.allclose(ours[row, head], weights @ v[seen, head // 2], atol=1e-5)


@pytest.mark.parametrize("fused", [True, False], ids=["last-arriver", "second-kernel"])
@pytest.mark.parametrize("kind", ["float", "dynamic", "static"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "lens", "window"),
    [
        (2, 2, 32, [37, 5], None),
        (8, 2, 64, [0, 70, 16], None),
        (4, 1, 32, [70], 20),
    ],
    ids=["heads-own-keys", "shared-keys-and-an-empty-row", "window"],
)
def test_kernel_equals_the_reference(
    kind: str, fused: bool, num_heads: int, num_kv_heads: int, head_dim: int, lens: list[int], window: int | None
):  # fmt: skip
    cache, tables, _ = filled_cache(kind, lens, num_kv_heads, head_dim)
    q = torch.randn(len(lens), num_heads, head_dim).half()
    context_lens = torch.tensor(lens, dtype=torch.int32)
    scale = head_dim**-0.5
    ours = launch_decode(
        q, cache, tables, context_lens, scale, window, None, None, config=CONFIG, fused_merge=fused
    )
    reference = decode_attention_reference(q, cache, tables, context_lens, scale, window)
    assert relative(ours, reference) < 1e-3  # fp16 rounding of p and of the output: 2^-11 each
    assert all(ours[row].eq(0).all() for row, n in enumerate(lens) if n == 0)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("kind", ["float", "dynamic", "static"])
def test_rope_and_store_in_the_same_kernel(kind: str, has_norm: bool):
    """Expected from the torch reference of the two steps on an equal cache; lengths end a page, begin one, and are none."""
    lens = [70, 0, 17, 32]
    torch.manual_seed(3)
    qkv = torch.randn(4, (4 + 2 * 2) * 32).half()
    angles = torch.rand(4, 16) * 100
    norm = (torch.rand(32) + 0.5).half() if has_norm else None
    q_scale = torch.rand(4) + 1 if has_norm else None
    context_lens = torch.tensor(lens, dtype=torch.int32)
    caches = [filled_cache(kind, lens, 2, 32)[:2] for _ in range(2)]
    new = NewTokens(angles.cos(), angles.sin(), norm, norm, 1e-6, q_scale)
    ours = launch_decode(
        qkv.view(4, 8, 32), *caches[0], context_lens, 0.2, None, None, None, new=new, config=CONFIG
    )
    expected = rope_decode_attention(
        qkv, angles.cos(), angles.sin(), *caches[1], context_lens, 0.2, q_norm=norm, k_norm=norm, q_scale=q_scale
    )  # fmt: skip
    assert (
        relative(ours, expected) < 2e-3
    )  # rounding as above, and a neighbouring code of the new key here and there
    assert torch.equal(caches[0][0].v.nan_to_num(), caches[1][0].v.nan_to_num())
    changed = caches[0][0].k.nan_to_num().ne(filled_cache(kind, lens, 2, 32)[0].k.nan_to_num())
    assert changed.any(-1).sum() == 3 * 2  # the new keys of three sequences and two heads, nothing else


@triton.jit
def units_kernel(lens_ptr, units_ptr, most_ptr, batch, aim, WINDOW: tl.constexpr, EVEN: tl.constexpr):
    row = tl.arange(0, 16)
    units, most = share_tiles(lens_ptr, row, batch, aim, 16, WINDOW, EVEN)
    tl.store(units_ptr + row, units)
    tl.store(most_ptr, most)


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=16),
    st.integers(1, 40),
    st.sampled_from([0, 100]),
    st.integers(0, 20),
)
@settings(max_examples=60, deadline=None)
def test_units_keep_to_their_bound_and_share_evenly(lens: list[int], wave: int, window: int, least: int):
    aim, bound, even = share(wave, len(lens), least)
    units, most = torch.empty(16, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    units_kernel[(1,)](torch.tensor(lens, dtype=torch.int32), units, most, len(lens), aim, window, even)
    assert units[: len(lens)].ge(1).all() and units[len(lens) :].eq(0).all()
    assert units.sum() <= bound
    tiles = [-(-n // 16) - (max(n - window, 0) // 16 if window else 0) for n in lens]
    for count, have in zip(units.tolist(), tiles, strict=False):
        each = -(-have // count)
        assert each <= most and -(-have // max(each, 1)) in (
            count,
            0,
        )  # no unit of a sequence with tokens is empty
    if even and len(lens) < aim:
        assert most <= max(-(-sum(tiles) // (aim - len(lens))), 1)


def test_equal_lengths_fill_whole_waves():
    """Sequences of 128 tiles, 16 units a wave: 8 are cut in two, 24 too (three waves, not one and a half), 32 not at all."""
    for batch, expected in ((1, 16), (8, 2), (24, 2), (32, 1)):
        aim, _, even = share(16, batch)
        units, most = torch.empty(64, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
        lens = torch.full((batch,), 128 * 16, dtype=torch.int32)
        wide_units_kernel[(1,)](lens, units, most, batch, aim, even)
        assert units[:batch].eq(expected).all()


def test_sequences_stay_whole_where_they_are_enough():
    """66 units a wave, 33 of them enough: 8 and 16 are cut as ever, 31 to 33 fill what is enough and are cut beyond twice the mean."""
    cut = (66, 66, True)
    for batch, expected in ((8, cut), (16, cut), (32, (16, 48, False)), (33, (16, 49, False))):
        assert share(66, batch, 33) == expected
    assert share(66, 32) == cut and share(66, 29, 33)[2] and share(66, 44, 33)[2]
    assert share(66, 64, 33) == share(66, 64) == (64, 128, False)


@triton.jit
def wide_units_kernel(lens_ptr, units_ptr, most_ptr, batch, aim, EVEN: tl.constexpr):
    row = tl.arange(0, 64)
    units, most = share_tiles(lens_ptr, row, batch, aim, 16, 0, EVEN)
    tl.store(units_ptr + row, units)
    tl.store(most_ptr, most)


def test_one_long_sequence_among_short_ones_is_cut():
    """More sequences than a wave holds, so that equal ones stay whole: the long one alone is cut."""
    lens = [16, 400, 16, 16, 33]
    cache, tables, _ = filled_cache("dynamic", lens, 4, 32)
    q, context_lens = torch.randn(5, 4, 32).half(), torch.tensor(lens, dtype=torch.int32)
    config = DecodeConfig(
        tile=16, num_warps=4, num_stages=2, per_sm=2
    )  # 16 programs of 4 heads: waves of 4 units
    ours = launch_decode(q, cache, tables, context_lens, 0.2, None, None, None, config=config)
    assert relative(ours, decode_attention_reference(q, cache, tables, context_lens, 0.2)) < 1e-3


@pytest.mark.parametrize("config", [replace(CONFIG, max_fused_units=9), replace(CONFIG, min_per_sm=1)])
def test_other_cuts_and_merges_give_the_same_attention(config: DecodeConfig, monkeypatch: pytest.MonkeyPatch):
    lens = [70, 33, 0, 64]
    cache, tables, _ = filled_cache("dynamic", lens, 2, 32)
    q, context_lens = torch.randn(4, 8, 32).half(), torch.tensor(lens, dtype=torch.int32)
    merged = []
    counted = collections.defaultdict(lambda: lambda *_, **__: merged.append(1))
    monkeypatch.setattr(attention_triton, "merge_kernel", counted)
    ours = launch_decode(q, cache, tables, context_lens, 0.2, None, None, None, config=config)
    assert not merged
    assert relative(ours, decode_attention_reference(q, cache, tables, context_lens, 0.2)) < 1e-3
    launch_decode(q, cache, tables, context_lens, 0.2, None, None, None, config=CONFIG)
    assert merged  # as they are cut without these settings, a second kernel merges them


def test_workspace_is_left_ready_and_the_bits_repeat():
    lens = [70, 33]
    cache, tables, _ = filled_cache("dynamic", lens, 2, 32)
    q, context_lens = torch.randn(2, 4, 32).half(), torch.tensor(lens, dtype=torch.int32)
    units = max_units(2, 2, "cpu")
    workspace = DecodeWorkspace(
        torch.full((units, 4, 32), float("nan")), torch.full((units, 4), float("nan")), torch.zeros(4, dtype=torch.int32)
    )  # fmt: skip
    runs = [
        launch_decode(q, cache, tables, context_lens, 0.2, None, workspace, None, config=CONFIG)
        for _ in range(2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert workspace.arrivals.eq(0).all()


def test_small_value_scales_keep_their_precision():
    """Values of 1e-2 have scales near 4e-5, below fp16's normal range when multiplied with small weights."""
    cache, tables, _ = filled_cache("dynamic", [70], 1, 32)
    k, v = torch.randn(70, 1, 32), torch.randn(70, 1, 32) * 0.01
    token = torch.arange(70)
    store_kv(cache, k, v, tables[0].long()[token // PAGE] * PAGE + token % PAGE)
    q, context_lens = torch.randn(1, 4, 32).half(), torch.tensor([70], dtype=torch.int32)
    ours = launch_decode(q, cache, tables, context_lens, 0.2, None, None, None, config=CONFIG)
    assert relative(ours, decode_attention_reference(q, cache, tables, context_lens, 0.2)) < 2e-3


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", ["float", "dynamic"])
def test_prefill_equals_attention_over_the_whole_sequence(kind: str, window: int | None):
    """Two sequences: one prefilled whole, one whose last 5 tokens are a chunk; expected from torch's own attention."""
    cache, tables, exact = filled_cache(kind, [19, 40], 2, 32, torch.float32)
    q = torch.randn(19 + 5, 4, 32)
    ours = prefill_attention(q, cache, tables, [19, 5], [19, 40], 0.2, window)
    for (k, v), part, ours_part in zip(exact, q.split([19, 5]), ours.split([19, 5]), strict=True):
        length = k.shape[0]
        padded = torch.zeros(length, 4, 32)
        padded[-len(part) :] = part
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        mask = (j <= i) & (i - j < (window or length))
        expected = F.scaled_dot_product_attention(
            padded.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask, scale=0.2, enable_gqa=True
        ).transpose(0, 1)[-len(part) :]  # fmt: skip
        # int8 error: scores move by about q . error = 0.2 * sqrt(32) * 0.01, values by 0.01
        assert torch.allclose(ours_part, expected, atol=1e-5 if kind == "float" else 0.03)


def test_last_token_of_prefill_equals_decode():
    cache, tables, _ = filled_cache("dynamic", [33], 2, 32)
    q = torch.randn(1, 4, 32)
    lens = torch.tensor([33], dtype=torch.int32)
    decoded = decode_attention(q, cache, tables, lens, 0.2)
    # prefill rounds the dequantized cache to the dtype of q, here fp32
    assert torch.allclose(prefill_attention(q, cache, tables, [1], [33], 0.2), decoded, atol=1e-5)


def test_arguments_that_do_not_fit_are_refused():
    cache, tables, _ = filled_cache("dynamic", [20, 3], 2, 32)
    q, lens = torch.randn(2, 4, 32).half(), torch.tensor([20, 3], dtype=torch.int32)
    for arguments, message in (
        ((q[:, :3], cache, tables, lens, 1.0), "multiple of 2"),
        ((q[..., :16], cache, tables, lens, 1.0), "expected"),
        ((q, cache, tables.long(), lens, 1.0), "block_tables"),
        ((q, cache, tables, lens.long(), 1.0), "context_lens"),
        ((q, cache, tables, lens, 1.0, 0), "window 0"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(*arguments)
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        launch_decode(q.float(), cache, tables, lens, 1.0, None, None, None)
    small = DecodeWorkspace(torch.empty(1, 4, 32), torch.empty(1, 4), torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="allocate it for a larger batch"):
        launch_decode(q, cache, tables, lens, 1.0, None, small, None, config=CONFIG)
    with pytest.raises(ValueError, match="must sum to"):
        prefill_attention(q, cache, tables, [1, 2], [20, 3], 1.0)
    with pytest.raises(ValueError, match="one of each"):
        prefill_attention(q, cache, tables, [2], [20], 1.0)
