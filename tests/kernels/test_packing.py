"""Both packing orders nibble by nibble, one turned into the other, and columns of two matrices interleaved word by word."""

import itertools

import pytest
import torch

from kernels.packing import (
    AWQ_ORDER,
    CACHED_WORDS,
    SEQUENTIAL_ORDER,
    awq_to_sequential_,
    pack_awq,
    pack_columns,
    sequential_to_awq_,
    unpack_awq,
    unpack_columns,
    unzip_columns,
    zip_columns,
)

ORDERS = pytest.mark.parametrize("order", [AWQ_ORDER, SEQUENTIAL_ORDER], ids=["awq", "sequential"])


def random_codes(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)


def test_one_word_by_hand() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 15]], dtype=torch.uint8)
    assert int(pack_columns(codes, SEQUENTIAL_ORDER)) & 0xFFFFFFFF == 0xF6543210
    assert int(pack_columns(codes, AWQ_ORDER)) & 0xFFFFFFFF == 0xF5316420  # columns 7 5 3 1 6 4 2 0


@ORDERS
def test_words_hold_their_nibbles(order: tuple[int, ...]) -> None:
    codes = random_codes(5, 64)
    words = pack_columns(codes, order)
    assert words.dtype == torch.int32 and words.shape == (5, 8)
    for row, word, nibble in itertools.product(range(5), range(8), range(8)):
        assert (int(words[row, word]) >> (4 * nibble)) & 15 == codes[row, 8 * word + order[nibble]]
    assert torch.equal(unpack_columns(words, order), codes)


@ORDERS
def test_more_words_than_are_worked_on_at_a_time(order: tuple[int, ...]) -> None:
    codes = random_codes(33, CACHED_WORDS // 2)
    words = pack_columns(codes, order)
    nibbles = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], dim=-1)
    assert torch.equal(nibbles, codes.view(33, -1, 8)[..., list(order)].int())
    assert torch.equal(unpack_columns(words, order), codes)


@ORDERS
def test_matrices_that_lie_transposed(order: tuple[int, ...]) -> None:
    codes = random_codes(64, 24).t()
    words = pack_columns(codes, order)
    assert torch.equal(words, pack_columns(codes.contiguous(), order))
    assert torch.equal(unpack_columns(words.t().contiguous().t(), order), codes)


def test_one_order_becomes_the_other() -> None:
    codes = random_codes(7, 48)
    words = pack_columns(codes, AWQ_ORDER)
    assert torch.equal(awq_to_sequential_(words.clone()), pack_columns(codes, SEQUENTIAL_ORDER))
    assert torch.equal(sequential_to_awq_(awq_to_sequential_(words.clone())), words)


def test_awq_tensors_lie_transposed() -> None:
    codes = random_codes(16, 6)
    assert torch.equal(pack_awq(codes), pack_columns(codes.t(), AWQ_ORDER))
    assert torch.equal(unpack_awq(pack_awq(codes)), codes)


def test_columns_of_two_matrices_alternate() -> None:
    one, other = random_codes(3, 32), random_codes(4, 32)[:3]
    words = zip_columns(pack_columns(one, SEQUENTIAL_ORDER), pack_columns(other, SEQUENTIAL_ORDER))
    codes = unpack_columns(words, SEQUENTIAL_ORDER)
    assert torch.equal(codes[:, 0::2], one) and torch.equal(codes[:, 1::2], other)
    back = unzip_columns(words)
    assert torch.equal(unpack_columns(back[0], SEQUENTIAL_ORDER), one)
    assert torch.equal(unpack_columns(back[1], SEQUENTIAL_ORDER), other)


def test_ragged_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_columns(random_codes(2, 12), SEQUENTIAL_ORDER)
