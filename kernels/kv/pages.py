"""The paged cache that holds keys and values, as floats or as 8-bit codes. Knows nothing of rounding, kernels or requests.

Hkv key/value heads, D head_dim, P tokens of a page (block_size). Parameters of codes: *dynamic*, fp16 for each token and head, or
*static*, fp32 for each head; the formula is in `kv8.py`.

Pages are head-major so that the keys of one page and head are one contiguous run (8 KiB at 64 x 128 x 8 bit):

    float  k, v    (num_blocks, Hkv, P, D)       dtype of the model
    int8   k, v    (num_blocks, Hkv, P, D / 2)   int16: low byte the code of channel j, high byte that of channel j + D / 2
           params  (num_blocks, Hkv, 2, P, 2)    fp16: [key, value] x token x [scale, zero]; dynamic mode only

The two halves of a head share a word because RoPE rotates exactly these pairs, and because a 16-bit element is what `ldmatrix`
transposes: the decode kernel gets its tensor-core operand without touching single bytes. Slot s is token s % P of page s // P.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = 64  # default page: one tile of the decode kernel


@dataclass(frozen=True)
class StaticKV:
    """Static parameters of one layer, each fp32 (Hkv,) on the device of the cache."""

    k_scale: Tensor
    k_zero: Tensor
    v_scale: Tensor
    v_zero: Tensor

    def stacked(self) -> Tensor:
        """(4, Hkv) fp32: k_scale, k_zero, v_scale, v_zero."""
        return torch.stack([self.k_scale, self.k_zero, self.v_scale, self.v_zero]).float().contiguous()


@dataclass(frozen=True)
class KVCache:
    """Pages of one layer; shapes in the module docstring. `static` (4, Hkv) fp32 is None in dynamic mode and at float."""

    k: Tensor
    v: Tensor
    params: Tensor | None
    static: Tensor | None
    bits: int

    @property
    def num_blocks(self) -> int:
        return self.k.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def block_size(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3] * (2 if self.bits == 8 else 1)


def cache_block_bytes(
    num_kv_heads: int,
    head_dim: int,
    kv_bits: int,
    dtype: torch.dtype = torch.float16,
    *,
    block_size: int = BLOCK_SIZE,
    is_static: bool = False,
) -> int:
    """Bytes that one page of one layer takes: keys, values and, in dynamic mode, 8 bytes of parameters a token and head."""
    size_bytes = 2 * head_dim * (1 if kv_bits == 8 else dtype.itemsize)
    if kv_bits == 8 and not is_static:
        size_bytes += 8
    return size_bytes * num_kv_heads * block_size


def allocate_cache(
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    kv_bits: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    block_size: int = BLOCK_SIZE,
    static: StaticKV | None = None,
) -> KVCache:
    """Zeroed pages of one layer. kv_bits 16: floats of `dtype` (fp32 too); 8: codes, dynamic unless `static` is given.

    Raises ValueError where the kernels could not read the result: on CUDA a head_dim other than 32, 64, 128 or 256, a block_size
    that is no power of two from 16 on, other kv_bits, an odd head_dim at 8 bits, static parameters of another shape.
    """
    if kv_bits not in (8, 16):
        raise ValueError(f"kv_bits {kv_bits}: a cache holds 8-bit codes or 16 for floats of the given dtype.")
    if min(num_blocks, num_kv_heads, head_dim) < 1:
        raise ValueError(
            f"cache of {num_blocks} blocks, {num_kv_heads} heads, head_dim {head_dim}: all must be at least 1."
        )
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size {block_size}: expected a power of two of at least 16 tokens.")
    if kv_bits == 8 and head_dim % 2:
        raise ValueError(
            f"head_dim {head_dim}: int8 pages hold two channels a word and need an even head_dim."
        )
    if torch.device(device).type == "cuda" and head_dim not in (32, 64, 128, 256):
        raise ValueError(f"head_dim {head_dim}: the CUDA kernels take 32, 64, 128 or 256.")
    if static is not None and kv_bits != 8:
        raise ValueError(f"static parameters were given with kv_bits {kv_bits}; they belong to kv_bits 8.")
    shape = (num_blocks, num_kv_heads, block_size)
    if kv_bits == 16:
        pages = [torch.zeros(*shape, head_dim, dtype=dtype, device=device) for _ in range(2)]
        return KVCache(pages[0], pages[1], None, None, 16)
    pages = [torch.zeros(*shape, head_dim // 2, dtype=torch.int16, device=device) for _ in range(2)]
    if static is None:
        params = torch.zeros(num_blocks, num_kv_heads, 2, block_size, 2, dtype=torch.float16, device=device)
        return KVCache(pages[0], pages[1], params, None, 8)
    stacked = static.stacked().to(device)
    if tuple(stacked.shape) != (4, num_kv_heads):
        raise ValueError(
            f"static parameters have {stacked.shape[1:]} heads, expected ({num_kv_heads},) for each of four."
        )
    return KVCache(pages[0], pages[1], None, stacked, 8)
