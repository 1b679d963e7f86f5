"""Packing orders of 4-bit codes in 32-bit words, each an explicit index table. Knows nothing of files or models.

N out features, K in features, G groups. A word holds 8 nibbles; nibble i is bits 4i .. 4i + 3.
AWQ "gemm" order (AutoAWQ): nibble i of word w is column 8w + AWQ_ORDER[i]. Sequential order (TurboMind): column 8w + i.
One order becomes the other by exchanging bytes 1 and 2 of a word and nibbles 1 and 2 of each half. Little-endian machines.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SEQUENTIAL_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
MIDDLE_BYTES, MIDDLE_NIBBLES = (
    (8, 0x0000FF00),
    (4, 0x00F000F0),
)  # (distance, the lower ones): what is exchanged
CACHED_WORDS = 2**16  # words worked on at a time on a CPU: they and a copy stay in its second-level cache


def pack_columns(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """Pack values (R, C), integers 0..15, along C, in one of the two orders. Returns (R, C // 8) int32.

    Raises ValueError when C is no multiple of 8.
    """
    cols = values.shape[-1]
    if cols % 8:
        raise ValueError(
            f"{cols} columns cannot be packed: 8 codes share a 32-bit word, so a multiple of 8 is needed."
        )
    words = _pack(values.to(torch.uint8).contiguous())
    return words if order == SEQUENTIAL_ORDER else sequential_to_awq_(words)


def unpack_columns(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_columns`: words (R, C // 8) int32 -> values (R, C) uint8."""
    if order == SEQUENTIAL_ORDER:
        return _unpack(words.contiguous())
    return _unpack(awq_to_sequential_(words.clone(memory_format=torch.contiguous_format)))


def awq_to_sequential_(words: Tensor) -> Tensor:
    """Contiguous int32 words in AWQ order, any shape, become sequential ones in place."""
    return _exchange_(words, MIDDLE_BYTES, MIDDLE_NIBBLES)


def sequential_to_awq_(words: Tensor) -> Tensor:
    """Inverse of `awq_to_sequential_`, in place."""
    return _exchange_(words, MIDDLE_NIBBLES, MIDDLE_BYTES)


def zip_columns(even: Tensor, odd: Tensor) -> Tensor:
    """Sequential words (..., W) of two matrices -> (..., 2 W): column 2j is column j of `even`, 2j + 1 that of `odd`.

    Four codes of one and four of the other, side by side, are a word in AWQ order.
    """
    halves = torch.stack([even.view(torch.int16), odd.view(torch.int16)], dim=-1)  # (..., 2 W, 2)
    return awq_to_sequential_(halves.flatten(-2).view(torch.int32))


def unzip_columns(words: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `zip_columns`: sequential words (..., 2 W) -> two of (..., W)."""
    halves = sequential_to_awq_(words.clone(memory_format=torch.contiguous_format)).view(torch.int16)
    even, odd = (half.contiguous().view(torch.int32) for half in halves.unflatten(-1, (-1, 2)).unbind(-1))
    return even, odd


def pack_awq(values: Tensor) -> Tensor:
    """Weight-oriented codes (N, K) or zeros (N, G) -> AWQ qweight (K, N // 8) or qzeros (G, N // 8), int32."""
    return pack_columns(values.t(), AWQ_ORDER)


def unpack_awq(words: Tensor) -> Tensor:
    """AWQ qweight (K, N // 8) or qzeros (G, N // 8) int32 -> codes (N, K) or zeros (N, G) uint8."""
    return unpack_columns(words, AWQ_ORDER).t().contiguous()


def _pieces(words: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The flat tensors in equal runs, short ones on a CPU; a GPU takes them whole."""
    size = CACHED_WORDS if words.device.type == "cpu" else max(1, words.numel())
    return zip(words.split(size), *(other.split(size) for other in others), strict=True)


def _exchange_(words: Tensor, *steps: tuple[int, int]) -> Tensor:
    for (piece,) in _pieces(words.view(-1)):
        for shift, mask in steps:
            differing = (piece >> shift).bitwise_xor_(piece).bitwise_and_(mask)
            piece.bitwise_xor_(differing).bitwise_xor_(differing.bitwise_left_shift_(shift))
    return words


def _pack(values: Tensor) -> Tensor:
    """Eight bytes, each a code, are one 64-bit number; three steps move its nibbles together."""
    words = torch.empty(values.shape[0], values.shape[1] // 8, dtype=torch.int32, device=values.device)
    for eight, piece in _pieces(values.view(-1).view(torch.int64), words.view(-1)):
        lanes = eight
        for shift, mask in ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)):
            lanes = (lanes >> shift).bitwise_or_(lanes).bitwise_and_(mask)
        piece.copy_(lanes)
    return words


def _unpack(words: Tensor) -> Tensor:
    """Inverse of `_pack`: the nibbles of a 64-bit number move apart in three steps."""
    values = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.uint8, device=words.device)
    for piece, lanes in _pieces(words.view(-1), values.view(-1).view(torch.int64)):
        lanes.copy_(piece).bitwise_and_(0xFFFFFFFF)
        for shift, mask in ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F)):
            lanes.bitwise_or_(lanes << shift).bitwise_and_(mask)
    return values
