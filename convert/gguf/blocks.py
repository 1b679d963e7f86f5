"""Q4_0 and Q4_1 blocks of GGUF: 32 weights of a row each, packed from integers and unpacked into them. No weight is rounded here.

N out features, K in features, g group size. Q4_0, 18 bytes: float16 d, then 16 bytes; w = (q - 8) d. Q4_1, 20 bytes: float16 d,
float16 m, then 16 bytes; w = q d + m. Byte b holds weight b in its low half and weight b + 16 in its high half. A group of g
weights is g / 32 blocks with the same d and m. m = -z s is rounded to float16, at most 2^-11 of its size: 0.0073 s at most,
and nothing for z in {0, 1, 2, 4, 8}. Source: ggml-common.h and gguf/quants.py of llama.cpp.
"""

import torch
from torch import Tensor

from convert.checkpoint import Stored
from convert.linear_layouts.mlx import rounded_offsets, whole_zeros
from kernels.packing import SEQUENTIAL_ORDER, pack_columns, unpack_columns

BLOCK = 32
HALF = BLOCK // 2
BYTES = {"Q4_0": 18, "Q4_1": 20}  # of a block


def pack_blocks(linear: Stored, group_size: int, symmetric: bool) -> Tensor:
    """A packed linear in stored form -> uint8 (N, K / 32 * bytes of a block)."""
    codes = unpack_columns(linear["words"], SEQUENTIAL_ORDER).t()  # (N, K) uint8
    rows, cols = codes.shape
    blocks = codes.reshape(rows, cols // BLOCK, BLOCK)
    packed = blocks[..., :HALF] | (blocks[..., HALF:] << 4)
    scales = linear["scales"].t().contiguous()  # (N, G)
    heads = [scales] if symmetric else [scales, rounded_offsets(scales, linear["zeros"].t())]
    repeated = [
        part.repeat_interleave(group_size // BLOCK, dim=1).contiguous()[..., None].view(torch.uint8)
        for part in heads
    ]
    return torch.cat([*repeated, packed], dim=-1).reshape(rows, -1)


def unpack_blocks(name: str, data: Tensor, kind: str, group_size: int) -> Stored:
    """Inverse: uint8 (N, bytes) of the type `kind` -> stored form with groups of `group_size`.

    Raises InputError where the minima are no multiples of the scales, ValueError where the blocks of a group differ.
    """
    rows, width = data.shape[0], BYTES[kind]
    blocks = data.reshape(rows, -1, width)
    offset = width - HALF
    packed = blocks[..., offset:]
    codes = torch.cat([packed & 15, packed >> 4], dim=-1).reshape(rows, -1)  # (N, K)
    heads = blocks[..., :offset].contiguous().view(torch.float16)  # (N, K / 32, 1 or 2)
    scales = _of_groups(name, heads[..., 0], group_size // BLOCK)
    if kind == "Q4_0":
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    else:
        zeros = whole_zeros(name, scales, _of_groups(name, heads[..., 1], group_size // BLOCK))
    words = pack_columns(codes.t(), SEQUENTIAL_ORDER)
    return {"words": words, "scales": scales.t().contiguous(), "zeros": zeros.t().contiguous()}


def _of_groups(name: str, values: Tensor, count: int) -> Tensor:
    """One value for each `count` neighbouring blocks, (N, K / 32) -> (N, G)."""
    parts = values.unflatten(1, (-1, count))
    if not bool((parts == parts[..., :1]).all()):
        raise ValueError(f"{name}: blocks of one group have different scales")
    first: Tensor = parts[..., 0].contiguous()
    return first
