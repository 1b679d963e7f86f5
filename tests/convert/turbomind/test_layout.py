"""Layout functions against hand-written examples and the format's index formulas, and each against its inverse."""

import pytest
import torch

from convert.checkpoint import Stored
from convert.errors import InputError
from convert.turbomind import layout as layout
from kernels.packing import SEQUENTIAL_ORDER, pack_columns, unpack_columns


def int4(rows: int, columns: int, groups: int = 2) -> Stored:
    """Random codes as words (rows, columns / 8), their scales and zeros."""
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(0, 16, (rows + groups, columns), dtype=torch.uint8, generator=generator)
    scales = torch.rand(groups, columns, generator=generator).half()
    return {"words": pack_columns(codes[:rows], SEQUENTIAL_ORDER), "scales": scales, "zeros": codes[rows:]}


def codes(linear: Stored) -> torch.Tensor:
    return unpack_columns(linear["words"].contiguous(), SEQUENTIAL_ORDER)


def same(one: Stored, other: Stored) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_rope_order_of_two_heads_of_four() -> None:
    # halves (0 1 | 2 3) become pairs (0 2) (1 3), per head
    turned = layout.interleave_rope({"bias": torch.arange(8)}, 4)
    assert turned["bias"].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rope_order_of_codes_is_that_of_numbers() -> None:
    linear = int4(6, 96)
    turned = layout.interleave_rope(linear, 32)
    plain = layout.interleave_rope({"weight": codes(linear)}, 32)
    assert torch.equal(codes(turned), plain["weight"])
    assert turned["zeros"][1].tolist()[:4] == [linear["zeros"][1, i] for i in (0, 16, 1, 17)]


def test_rope_order_and_back() -> None:
    linear = {"weight": torch.randn(5, 24), "bias": torch.randn(24)}
    assert same(layout.separate_rope(layout.interleave_rope(linear, 8), 8), linear)
    packed = int4(6, 96)
    assert same(layout.separate_rope(layout.interleave_rope(packed, 32), 32), packed)


def test_fused_qkv_of_each_rank() -> None:
    # 4 query heads, 2 KV heads, head_dim 1, two ranks: rank 0 has q0 q1 k0 v0
    q, k, v = ({"bias": torch.tensor(row)} for row in ([0, 1, 2, 3], [10, 11], [20, 21]))
    ranks = layout.fuse_qkv(q, k, v, 2)
    assert [rank["bias"].tolist() for rank in ranks] == [[0, 1, 10, 20], [2, 3, 11, 21]]
    again = layout.split_qkv(ranks, 2, 1)
    assert [part["bias"].tolist() for part in again] == [[0, 1, 2, 3], [10, 11], [20, 21]]


def test_fused_codes_of_each_rank_and_back() -> None:
    q, k, v = int4(4, 64), int4(4, 32), int4(4, 32)
    ranks = layout.fuse_qkv(q, k, v, 2)
    assert torch.equal(codes(ranks[1])[:, :32], codes(q)[:, 32:])
    assert all(
        same(one, other) for one, other in zip(layout.split_qkv(ranks, 32, 16), (q, k, v), strict=True)
    )


def test_replicated_heads_are_adjacent() -> None:
    copies = layout.replicate_heads({"bias": torch.tensor([0, 1, 2, 3])}, 2, 2)
    assert copies["bias"].tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    packed = int4(3, 32)
    copies = layout.replicate_heads(packed, 16, 2)
    assert torch.equal(codes(copies)[:, 16:32], codes(packed)[:, :16]) and copies["words"].shape == (3, 8)
    assert same(layout.unreplicate_heads(copies, 16, 2), packed)


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


def test_inputs_split_with_their_groups() -> None:
    linear = {
        "words": torch.arange(16, dtype=torch.int32).view(8, 2),
        "scales": torch.arange(32.0).view(2, 16),
        "zeros": torch.arange(32).view(2, 16),
        "bias": torch.arange(16.0),
    }
    ranks = layout.split_inputs(linear, 2)
    assert ranks[1]["words"].tolist() == [[8, 9], [10, 11], [12, 13], [14, 15]]
    assert ranks[1]["scales"][0, 0] == 16 and torch.equal(ranks[1]["bias"], linear["bias"])
    assert same(layout.join_inputs(ranks), linear)


def test_outputs_split_by_whole_words() -> None:
    linear = int4(4, 32)
    ranks = layout.split_outputs(linear, 2)
    assert torch.equal(codes(ranks[1]), codes(linear)[:, 16:]) and ranks[1]["scales"].shape == (2, 16)
    assert same(layout.join_outputs(ranks), linear)


def test_padding_adds_zeros_only_and_is_cut_off_again() -> None:
    linear = int4(8, 16)
    grown = layout.pad_inputs(layout.pad_outputs(linear, 32), 12, 4)
    assert grown["words"].shape == (12, 4) and grown["scales"].shape == (3, 32)
    assert not codes(grown)[:, 16:].any() and not codes(grown)[8:].any() and not grown["zeros"][2:].any()
    assert same(layout.cut_inputs(layout.cut_outputs(grown, 16), 8, 4), linear)


def test_tiles_follow_the_index_formula() -> None:
    rows, columns = 64, 96
    linear = int4(rows, columns)
    tiles = layout.pack_tiles(linear["words"])
    assert tiles.shape == (2, 3, 128) and tiles.dtype == torch.int32
    k, n = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    lane = 4 * (n % 8) + (k % 8) // 2
    word = 2 * ((k % 32) // 16) + (n % 32) // 16
    nibble = 4 * (k % 2) + 2 * ((k % 16) // 8) + (n % 16) // 8
    address = ((k // 32) * (columns // 32) + n // 32) * 128 + lane * 4 + word
    found = (tiles.flatten()[address] >> (4 * nibble)) & 15
    assert torch.equal(found, codes(linear).int())
    assert torch.equal(layout.unpack_tiles(tiles), linear["words"])


def test_tiles_are_whole() -> None:
    with pytest.raises(InputError, match="48 x 64 matrix does not divide"):
        layout.pack_tiles(int4(48, 64)["words"])


def test_scales_zeros_bits() -> None:
    packed = layout.scales_zeros(torch.tensor([1.0, -2.0]).half(), torch.tensor([0, 15], dtype=torch.uint8))
    assert [value & 0xFFFFFFFF for value in packed.tolist()] == [0x3C005400, 0xC00054F0]
    scales, zeros = layout.split_scales_zeros(packed)
    assert scales.tolist() == [1.0, -2.0] and zeros.tolist() == [0, 15]


def test_gate_is_even_and_up_is_odd() -> None:
    gate, up = int4(2, 16), int4(2, 24)
    up = {name: part[:, : gate[name].shape[1]].contiguous() for name, part in up.items()}
    fused = layout.interleave_gate_up(gate, up)
    assert torch.equal(codes(fused)[:, 0::2], codes(gate)) and torch.equal(codes(fused)[:, 1::2], codes(up))
    assert torch.equal(fused["scales"][:, 1::2], up["scales"])
    again = layout.separate_gate_up(fused)
    assert same(again[0], gate) and same(again[1], up)
