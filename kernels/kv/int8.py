"""Quantized keys and values: the one definition of their rounding, and how they go into the paged cache and come out.

T tokens, Hkv key/value heads, D head_dim. Formula: x^ = (code - half) * scale + zero with code in 0 .. 2^b - 1 and half = 2^(b-1);
8 bits: (u8 - 128) * scale + zero. Two modes: *dynamic*, scale and zero fp16 for each token and head, from that token's own minimum and
maximum; *static*, scale and zero fp32 for each head, given. The layout of pages is in `kv_cache.py`. Knows nothing of models or
requests. Imports Triton only when a tensor lies on a CUDA device.
"""

import torch
from torch import Tensor

from kernels.kv.pages import KVCache

SCALE_MIN = 2.0**-24  # smallest positive fp16: the scale of a constant token, so that no division is by zero
SCALE_MAX = 65504.0


def kv_qparams(low: Tensor, high: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Scale and zero of the range [low, high], any shape, fp32: scale = (high - low) / (2^b - 1), zero = low + half * scale."""
    low, high = low.float(), high.float()
    scale = ((high - low) / (2**bits - 1)).clamp(SCALE_MIN, SCALE_MAX)
    return scale, (low + 2 ** (bits - 1) * scale).clamp(-SCALE_MAX, SCALE_MAX)


def kv_dynamic_qparams(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Scale and zero of each token and head of x (..., Hkv, D): fp16 (..., Hkv). The zero is that of the rounded scale."""
    low, high = x.float().amin(-1), x.float().amax(-1)
    scale = ((high - low) / (2**bits - 1)).clamp(SCALE_MIN, SCALE_MAX).half()
    zero = (low + 2 ** (bits - 1) * scale.float()).clamp(-SCALE_MAX, SCALE_MAX).half()
    return scale, zero


def quantize_kv(
    x: Tensor, bits: int = 8, scale: Tensor | None = None, zero: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (..., Hkv, D) uint8, scale and zero of x (..., Hkv, D), any float dtype, 8 or 4 bits (a code a byte in both).

    Without scale and zero: dynamic, they are fp16 (..., Hkv). With them, shape (Hkv,): static, returned as given.
    code = clamp(round_half_even((x - zero) / scale), -half, half - 1) + half, in fp32. Raises ValueError on other bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"kv bits {bits}: keys and values are quantized to 8 or 4 bits.")
    if (scale is None) != (zero is None):
        raise ValueError(
            "static quantization of keys and values needs both scale and zero; dynamic, neither."
        )
    if scale is None or zero is None:
        scale, zero = kv_dynamic_qparams(x, bits)
    half = 2 ** (bits - 1)
    steps = (x.float() - zero.float()[..., None]) / scale.float()[..., None]
    return (steps.clamp(-half, half - 1).round() + half).to(torch.uint8), scale, zero


def dequantize_kv(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int = 8, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(code - half) * scale + zero for codes (..., Hkv, D), scale and zero (..., Hkv) or (Hkv,): fp32, then rounded to dtype."""
    centred: Tensor = codes.float() - 2 ** (bits - 1)
    return (centred * scale.float()[..., None] + zero.float()[..., None]).to(dtype)


def pack_halves(codes: Tensor) -> Tensor:
    """(..., D) uint8 -> (..., D / 2) int16: word j = code[j] | code[j + D / 2] << 8."""
    low, high = codes.to(torch.int32).chunk(2, -1)
    return (low | high << 8).to(torch.int16)  # wraps: the sign bit is the top bit of the high code


def unpack_halves(words: Tensor) -> Tensor:
    """(..., D / 2) int16 -> (..., D) uint8, the inverse of `pack_halves`."""
    wide = words.to(torch.int32)
    return torch.cat([wide & 255, wide >> 8 & 255], -1).to(torch.uint8)


def store_kv(cache: KVCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Write k, v (T, Hkv, D), any float dtype, into the slots (T,) int64 of the cache; a negative slot is skipped.

    Slots must be distinct and below num_blocks * block_size (not checked: that would stall the device). No host sync on CUDA.
    """
    _check_store(cache, k, v, slot_mapping)
    if k.is_cuda:
        from kernels.kv.int8_triton import launch_store

        launch_store(cache, k, v, slot_mapping)
    else:
        store_kv_reference(cache, k, v, slot_mapping)


def _check_store(cache: KVCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    expected = (k.shape[0], cache.num_kv_heads, cache.head_dim)
    for name, part in (("k", k), ("v", v)):
        if tuple(part.shape) != expected or not part.is_floating_point():
            raise ValueError(
                f"{name} is {tuple(part.shape)} {part.dtype}, expected floats (T, Hkv, D) = {expected}."
            )
    if tuple(slot_mapping.shape) != (k.shape[0],) or slot_mapping.dtype != torch.int64:
        raise ValueError(
            f"slot_mapping is {tuple(slot_mapping.shape)} {slot_mapping.dtype}, expected ({k.shape[0]},) torch.int64."
        )
    if not k.device == v.device == slot_mapping.device == cache.k.device:
        raise ValueError(
            f"k, v, slots and cache lie on {k.device}, {v.device}, {slot_mapping.device}, {cache.k.device}: expected one device."
        )


def store_kv_reference(cache: KVCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """The same as `store_kv` in torch."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    page, token = slots // cache.block_size, slots % cache.block_size
    for index, (pages, x) in enumerate(((cache.k, k[kept]), (cache.v, v[kept]))):
        if cache.bits == 16:
            pages[page, :, token] = x.to(pages.dtype)
        elif cache.static is not None:
            codes, _, _ = quantize_kv(x, 8, cache.static[2 * index], cache.static[2 * index + 1])
            pages[page, :, token] = pack_halves(codes)
        else:
            assert cache.params is not None
            codes, scale, zero = quantize_kv(x, 8)
            pages[page, :, token] = pack_halves(codes)
            cache.params[page, :, index, token] = torch.stack([scale, zero], -1)


def gather_kv(
    cache: KVCache, block_table: Tensor, length: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values (Hkv, length, D) of one sequence, dequantized, in `dtype` (default: the cache's, or fp16 at 8 bits).

    block_table (max_blocks,) int32: pages of the sequence in order. Raises ValueError where it is too short.
    """
    needed = -(-length // cache.block_size)
    if block_table.ndim != 1 or block_table.shape[0] < needed:
        raise ValueError(
            f"block_table is {tuple(block_table.shape)}, but {length} tokens need ({needed},) or more."
        )
    dtype = dtype or (cache.k.dtype if cache.bits == 16 else torch.float16)
    if cache.k.is_cuda:
        from kernels.kv.int8_triton import launch_gather

        return launch_gather(cache, block_table, length, dtype)
    return gather_kv_reference(cache, block_table, length, dtype)


def gather_kv_reference(
    cache: KVCache, block_table: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same as `gather_kv` in torch."""
    pages = block_table[: -(-length // cache.block_size)].long()
    gathered: list[Tensor] = []
    for index, source in enumerate((cache.k, cache.v)):
        x = source[pages].transpose(0, 1).flatten(1, 2)[:, :length]  # (n, Hkv, P, .) -> (Hkv, length, .)
        if cache.bits == 8:
            if cache.static is not None:
                scale = cache.static[2 * index, :, None].expand(-1, length)
                zero = cache.static[2 * index + 1, :, None].expand(-1, length)
            else:
                assert cache.params is not None
                pairs = (
                    cache.params[pages, :, index].transpose(0, 1).flatten(1, 2)[:, :length]
                )  # (Hkv, length, 2)
                scale, zero = pairs[..., 0], pairs[..., 1]
            x = dequantize_kv(unpack_halves(x), scale, zero)
        gathered.append(x.to(dtype))
    return gathered[0], gathered[1]
