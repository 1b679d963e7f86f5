"""Triton kernels that write and read the paged cache; the numerics, the layout and the torch references are in `kv8.py`.

T tokens, Hkv kv heads, D head_dim, P tokens of a page, HEADS heads of a program. Bit-equal to the references.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.pages import KVCache

MODE_FLOAT, MODE_DYNAMIC, MODE_STATIC = 0, 1, 2


def cache_mode(cache: KVCache) -> int:
    """What the kernels' MODE is for this cache."""
    if cache.bits == 16:
        return MODE_FLOAT
    return MODE_DYNAMIC if cache.static is None else MODE_STATIC


def cache_pointers(cache: KVCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, params as int32 pairs, static; a tensor that this mode lacks is stood in for by one never read."""
    params = cache.k if cache.params is None else cache.params.view(torch.int32)
    return cache.k, cache.v, params, cache.k if cache.static is None else cache.static


@triton.jit
def low_half(pair):
    """The fp16 in the low 16 bits of an int32, as fp32."""
    return pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(pair):
    """The fp16 in the high 16 bits of an int32, as fp32."""
    return (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def round_code(x, zero, scale):
    """clamp(round_half_even((x - zero) / scale), -128, 127) + 128 as int32; adding 1.5 * 2^23 rounds as the hardware does."""
    steps = tl.div_rn(x - zero, scale)
    steps = tl.minimum(tl.maximum(steps, -128.0), 127.0)
    return ((steps + 12582912.0) - 12582912.0).to(tl.int32) + 128


@triton.jit
def store_heads(
    low,
    high,
    pages_ptr,
    params_ptr,
    static_ptr,
    slot,
    heads,
    num_kv_heads,
    SIDE: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Write one token of some heads: low, high (HEADS, D / 2) fp32, channels j and j + D / 2. SIDE 0 keys, 1 values.

    Nothing is written at a negative slot or for heads from num_kv_heads on.
    """
    dims = tl.arange(0, HALF)
    ok = (heads < num_kv_heads) & (slot + tl.zeros_like(heads) >= 0)
    row = (slot // PAGE * num_kv_heads + heads) * PAGE + slot % PAGE  # (HEADS,) int64
    if MODE == 0:
        where = pages_ptr + row[:, None] * (2 * HALF) + dims[None, :]
        tl.store(where, low.to(pages_ptr.dtype.element_ty), mask=ok[:, None])
        tl.store(where + HALF, high.to(pages_ptr.dtype.element_ty), mask=ok[:, None])
    else:
        if MODE == 2:
            scale = tl.load(static_ptr + 2 * SIDE * num_kv_heads + heads, mask=ok, other=1.0)
            zero = tl.load(static_ptr + (2 * SIDE + 1) * num_kv_heads + heads, mask=ok, other=0.0)
        else:
            least = tl.minimum(tl.min(low, 1), tl.min(high, 1))
            most = tl.maximum(tl.max(low, 1), tl.max(high, 1))
            scale = tl.div_rn(most - least, tl.full(most.shape, 255.0, tl.float32))
            scale16 = tl.minimum(tl.maximum(scale, 5.9604644775390625e-08), 65504.0).to(tl.float16)
            scale = scale16.to(tl.float32)
            zero16 = tl.minimum(tl.maximum(least + 128.0 * scale, -65504.0), 65504.0).to(tl.float16)
            zero = zero16.to(tl.float32)
            pair = (scale16.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (
                zero16.to(tl.int16, bitcast=True).to(tl.int32) << 16
            )
            pair_row = ((slot // PAGE * num_kv_heads + heads) * 2 + SIDE) * PAGE + slot % PAGE
            tl.store(params_ptr + pair_row, pair, mask=ok)
        scale, low = tl.broadcast(scale[:, None], low)
        zero, low = tl.broadcast(zero[:, None], low)
        word = round_code(low, zero, scale) | (round_code(high, zero, scale) << 8)
        tl.store(pages_ptr + row[:, None] * HALF + dims[None, :], word.to(tl.int16), mask=ok[:, None])


@triton.jit
def store_kernel(
    k_ptr,
    v_ptr,
    k_pages_ptr,
    v_pages_ptr,
    params_ptr,
    static_ptr,
    slots_ptr,
    num_kv_heads,
    k_stride,
    v_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Program (token, heads, side): k or v (T, Hkv, D), row strides given, heads contiguous, into the slot of the token."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    slot = tl.load(slots_ptr + token)
    dims = tl.arange(0, HALF)
    offset = heads[:, None] * (2 * HALF) + dims[None, :]
    ok = (heads < num_kv_heads)[:, None]
    if tl.program_id(2) == 0:
        source = k_ptr + token * k_stride + offset
        low = tl.load(source, mask=ok, other=0.0).to(tl.float32)
        high = tl.load(source + HALF, mask=ok, other=0.0).to(tl.float32)
        store_heads(
            low, high, k_pages_ptr, params_ptr, static_ptr, slot, heads, num_kv_heads, 0, HALF, PAGE, MODE
        )
    else:
        source = v_ptr + token * v_stride + offset
        low = tl.load(source, mask=ok, other=0.0).to(tl.float32)
        high = tl.load(source + HALF, mask=ok, other=0.0).to(tl.float32)
        store_heads(
            low, high, v_pages_ptr, params_ptr, static_ptr, slot, heads, num_kv_heads, 1, HALF, PAGE, MODE
        )


# Lengths and places of tables differ from call to call: one binary for all of them.
@triton.jit(do_not_specialize=["length"], do_not_specialize_on_alignment=["table_ptr"])
def gather_kernel(
    k_pages_ptr,
    v_pages_ptr,
    params_ptr,
    static_ptr,
    table_ptr,
    k_ptr,
    v_ptr,
    length,
    num_kv_heads,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Program (page of the sequence, head, side): its tokens, dequantized, into k or v (Hkv, length, D), contiguous."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    side = tl.program_id(2)
    page = tl.load(table_ptr + index).to(tl.int64)
    tokens = tl.arange(0, PAGE)
    dims = tl.arange(0, HALF)
    ok = (index * PAGE + tokens < length)[:, None]
    row = (page * num_kv_heads + head) * PAGE + tokens
    pages_ptr = k_pages_ptr
    out_ptr = k_ptr
    if side == 1:
        pages_ptr = v_pages_ptr
        out_ptr = v_ptr
    if MODE == 0:
        source = pages_ptr + row[:, None] * (2 * HALF) + dims[None, :]
        low = tl.load(source, mask=ok, other=0.0)
        high = tl.load(source + HALF, mask=ok, other=0.0)
    else:
        words = tl.load(pages_ptr + row[:, None] * HALF + dims[None, :], mask=ok, other=0)
        if MODE == 2:
            scale = tl.load(static_ptr + 2 * side * num_kv_heads + head + tl.zeros_like(tokens))
            zero = tl.load(static_ptr + (2 * side + 1) * num_kv_heads + head + tl.zeros_like(tokens))
        else:
            pair = tl.load(params_ptr + ((page * num_kv_heads + head) * 2 + side) * PAGE + tokens)
            scale = low_half(pair)
            zero = high_half(pair)
        low = ((words & 0xFF) - 128).to(tl.float32) * scale[:, None] + zero[:, None]
        high = (((words >> 8) & 0xFF) - 128).to(tl.float32) * scale[:, None] + zero[:, None]
    target = (
        out_ptr + (head.to(tl.int64) * length + index * PAGE + tokens)[:, None] * (2 * HALF) + dims[None, :]
    )
    tl.store(target, low.to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(target + HALF, high.to(out_ptr.dtype.element_ty), mask=ok)


def launch_store(cache: KVCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """`store_kv` on CUDA (or in the interpreter), arguments checked already."""
    tokens, num_kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    k, v = (x if x.stride(2) == 1 and x.stride(1) == head_dim else x.contiguous() for x in (k, v))
    heads = 1 if tokens * num_kv_heads <= 2048 else min(8, triton.next_power_of_2(num_kv_heads))
    store_kernel[(tokens, triton.cdiv(num_kv_heads, heads), 2)](
        k,
        v,
        *cache_pointers(cache),
        slot_mapping,
        num_kv_heads,
        k.stride(0),
        v.stride(0),
        HEADS=heads,
        HALF=head_dim // 2,
        PAGE=cache.block_size,
        MODE=cache_mode(cache),
        num_warps=1 if heads == 1 else 2,
        enable_fp_fusion=True,
    )


def launch_gather(
    cache: KVCache, block_table: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`gather_kv` on CUDA (or in the interpreter), arguments checked already."""
    shape = (cache.num_kv_heads, length, cache.head_dim)
    k, v = (torch.empty(shape, dtype=dtype, device=cache.k.device) for _ in range(2))
    if length:
        gather_kernel[(triton.cdiv(length, cache.block_size), cache.num_kv_heads, 2)](
            *cache_pointers(cache),
            block_table.contiguous(),
            k,
            v,
            length,
            cache.num_kv_heads,
            HALF=cache.head_dim // 2,
            PAGE=cache.block_size,
            MODE=cache_mode(cache),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return k, v
