"""Packing orders of 4-bit codes in 32-bit words, each an explicit index table. Knows nothing of files or models.

N out features, K in features, G groups. A word holds 8 nibbles; nibble i is bits 4i .. 4i + 3.
AWQ "gemm" order (AutoAWQ): nibble i of word w is column 8w + AWQ_ORDER[i]. Sequential order (TurboMind): column 8w + i.
"""

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SEQUENTIAL_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def pack_columns(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """Pack values (R, C), integers 0..15, along C. Returns (R, C // 8) int32. Raises ValueError when C is no multiple of 8."""
    rows, cols = values.shape
    if cols % 8:
        raise ValueError(
            f"{cols} columns cannot be packed: 8 codes share a 32-bit word, so a multiple of 8 is needed."
        )
    if order == SEQUENTIAL_ORDER and values.dtype == torch.uint8:
        return _pack_sequential(values.contiguous())
    grouped = values.view(rows, cols // 8, 8).to(torch.int32)
    words = torch.zeros(rows, cols // 8, dtype=torch.int32, device=values.device)
    for nibble, column in enumerate(order):
        words |= grouped[:, :, column] << (4 * nibble)
    return words


def unpack_columns(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_columns`: words (R, C // 8) int32 -> values (R, C) uint8."""
    rows, width = words.shape
    if order == AWQ_ORDER and words.is_contiguous():
        return _unpack_awq_words(words)
    values = torch.empty(rows, width, 8, dtype=torch.uint8, device=words.device)
    for nibble, column in enumerate(order):
        values[:, :, column] = ((words >> (4 * nibble)) & 15).to(torch.uint8)
    return values.view(rows, width * 8)


def _pack_sequential(values: Tensor) -> Tensor:
    """Eight bytes, each a code, are one 64-bit number; three steps move its nibbles together (little-endian machines)."""
    lanes = values.view(torch.int64)
    for shift, mask in ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)):
        lanes = (lanes >> shift).bitwise_or_(lanes).bitwise_and_(mask)
    return lanes.to(torch.int32)


def _unpack_awq_words(words: Tensor) -> Tensor:
    """Even columns are the nibbles of a word's low half, odd ones of its high half: each half is spread over 64 bits."""
    lanes = words.to(torch.int64)
    halves = []
    for half in (lanes & 0xFFFF, (lanes >> 16).bitwise_and_(0xFFFF)):
        half.bitwise_or_(half << 24).bitwise_and_(0x000000FF000000FF)
        halves.append(half.bitwise_or_(half << 12).bitwise_and_(0x000F000F000F000F))
    return halves[0].bitwise_or_(halves[1].bitwise_left_shift_(8)).view(torch.uint8)


def pack_awq(values: Tensor) -> Tensor:
    """Weight-oriented codes (N, K) or zeros (N, G) -> AWQ qweight (K, N // 8) or qzeros (G, N // 8), int32."""
    return pack_columns(values.t().contiguous(), AWQ_ORDER)


def unpack_awq(words: Tensor) -> Tensor:
    """AWQ qweight (K, N // 8) or qzeros (G, N // 8) int32 -> codes (N, K) or zeros (N, G) uint8."""
    return unpack_columns(words, AWQ_ORDER).t().contiguous()
