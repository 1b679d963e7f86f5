"""Layout functions against hand-written examples and the format's index formulas, and each against its inverse."""

import itertools

import pytest
import torch

from convert import turbomind_layout as layout
from convert.errors import InputError
from kernels.packing import AWQ_ORDER, SEQUENTIAL_ORDER, pack_columns, unpack_columns


def test_rope_order_of_two_heads_of_four() -> None:
    # halves (0 1 | 2 3) become pairs (0 2) (1 3), per head
    assert layout.rope_order(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rope_order_and_back() -> None:
    linear = {"weight": torch.randn(24, 5), "bias": torch.randn(24)}
    back = layout.separate_rope(layout.interleave_rope(linear, 8), 8)
    assert torch.equal(back["weight"], linear["weight"]) and torch.equal(back["bias"], linear["bias"])


def test_fused_qkv_rows_of_each_rank() -> None:
    # 4 query heads, 2 KV heads, head_dim 1, two ranks: rank 0 has q0 q1 k0 v0
    q, k, v = ({"weight": torch.tensor(rows).view(-1, 1)} for rows in ([0, 1, 2, 3], [10, 11], [20, 21]))
    ranks = layout.fuse_qkv(q, k, v, 2)
    assert [rank["weight"].flatten().tolist() for rank in ranks] == [[0, 1, 10, 20], [2, 3, 11, 21]]
    again = layout.split_qkv(ranks, 2, 1)
    assert [part["weight"].flatten().tolist() for part in again] == [[0, 1, 2, 3], [10, 11], [20, 21]]


def test_replicated_heads_are_adjacent() -> None:
    linear = {"weight": torch.tensor([[0], [1], [2], [3]])}
    copies = layout.replicate_heads(linear, 2, 2)
    assert copies["weight"].flatten().tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert torch.equal(layout.unreplicate_heads(copies, 2, 2)["weight"], linear["weight"])


def test_kv_replication_names_what_does_not_fit() -> None:
    assert [layout.kv_replication(8, tp) for tp in (1, 2, 8, 16)] == [1, 1, 1, 2]
    with pytest.raises(InputError, match="3 KV heads cannot be divided among 2"):
        layout.kv_replication(3, 2)


@pytest.mark.parametrize(
    ("size", "group", "tp", "padded"),
    [
        (11008, 128, 1, 11008),
        (11008, 128, 4, 11264),
        (13824, 128, 8, 14336),
        (100, 0, 8, 104),
        (1536, 0, 1, 1536),
    ],
)
def test_padded_intermediate(size: int, group: int, tp: int, padded: int) -> None:
    assert layout.padded_intermediate(size, group, tp) == padded


def test_columns_split_with_their_groups() -> None:
    linear = {
        "qweight": torch.arange(16, dtype=torch.uint8).view(2, 8),
        "scales": torch.arange(4.0).view(2, 2),
        "zeros": torch.arange(4).view(2, 2),
        "bias": torch.tensor([1.0, 2.0]),
    }
    ranks = layout.split_columns(linear, 2)
    assert ranks[1]["qweight"].tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]
    assert ranks[1]["scales"].tolist() == [[1.0], [3.0]] and ranks[1]["bias"].tolist() == [1.0, 2.0]
    again = layout.join_columns(ranks)
    assert all(torch.equal(again[name], part) for name, part in linear.items())


def test_padding_adds_zeros_only() -> None:
    linear = {
        "qweight": torch.ones(4, 8, dtype=torch.uint8),
        "scales": torch.ones(4, 2),
        "zeros": torch.ones(4, 2),
    }
    grown = layout.pad_columns(layout.pad_rows(linear, 6), 12, 4)
    assert grown["qweight"].shape == (6, 12) and grown["scales"].shape == (6, 3)
    assert grown["qweight"].sum() == 32 and grown["zeros"].sum() == 8


@pytest.mark.parametrize("order", [AWQ_ORDER, SEQUENTIAL_ORDER], ids=["awq", "sequential"])
def test_words_hold_their_nibbles(order: tuple[int, ...]) -> None:
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = pack_columns(codes, order)
    assert words.dtype == torch.int32 and words.shape == (5, 8)
    for row, word, nibble in itertools.product(range(5), range(8), range(8)):
        assert (int(words[row, word]) >> (4 * nibble)) & 15 == codes[row, 8 * word + order[nibble]]
    assert torch.equal(unpack_columns(words, order), codes)


def test_tiles_follow_the_index_formula_word_by_word() -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (64, 96), dtype=torch.uint8)
    words = layout.pack_tiles(codes).flatten().tolist()
    for k, n in [(0, 0), (1, 0), (8, 0), (0, 8), (16, 0), (0, 16), (31, 31), (32, 0), (37, 70), (63, 95)]:
        lane = 4 * (n % 8) + (k % 8) // 2
        word = 2 * ((k % 32) // 16) + (n % 32) // 16
        nibble = 4 * (k % 2) + 2 * ((k % 16) // 8) + (n % 16) // 8
        address = ((k // 32) * 3 + n // 32) * 128 + lane * 4 + word
        assert (words[address] >> (4 * nibble)) & 15 == codes[k, n]
    assert torch.equal(layout.unpack_tiles(layout.pack_tiles(codes)), codes)


def test_every_nibble_of_a_tile_is_used_once() -> None:
    address, nibble = layout.tile_index(32, 64)
    assert len(set((address * 8 + nibble).flatten().tolist())) == 32 * 64


def test_scales_zeros_bits() -> None:
    packed = layout.scales_zeros(torch.tensor([1.0, -2.0]).half(), torch.tensor([0, 15], dtype=torch.uint8))
    assert [value & 0xFFFFFFFF for value in packed.tolist()] == [0x3C005400, 0xC00054F0]
    scales, zeros = layout.split_scales_zeros(packed)
    assert scales.tolist() == [1.0, -2.0] and zeros.tolist() == [0, 15]


def test_gate_rows_are_even_and_up_rows_odd() -> None:
    gate, up = {"scales": torch.tensor([[0.0], [1.0]])}, {"scales": torch.tensor([[10.0], [11.0]])}
    fused = layout.interleave_gate_up(gate, up)
    assert fused["scales"].flatten().tolist() == [0.0, 10.0, 1.0, 11.0]
    again = layout.separate_gate_up(fused)
    assert again[0]["scales"].tolist() == [[0.0], [1.0]] and again[1]["scales"].tolist() == [[10.0], [11.0]]
