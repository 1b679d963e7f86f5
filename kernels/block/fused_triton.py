"""Triton kernels of `fused.py`, where the contracts and the torch references are. Statistics, angles and products are fp32."""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.int8_triton import cache_mode, cache_pointers, store_heads
from kernels.kv.pages import KVCache

ONE_HEAD_PROGRAMS = (
    2048  # heads of all tokens up to which a program takes one head: decode wants many small programs
)


@triton.jit
def rms_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    total_ptr,
    out_ptr,
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row a program: total = x + delta (ADD), rounded and stored, then its norm; BLOCK >= width, the rest is masked.

    PDL: the kernel behind is let in before this one waits, so that its weights are on their way meanwhile; it must wait itself
    before it touches anything that this kernel or an earlier one writes.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    ok = cols < width
    weight = tl.load(
        weight_ptr + cols, mask=ok, other=0.0
    )  # a weight: no earlier kernel of the step writes it
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * width + cols, mask=ok, other=0.0)
    if ADD:
        delta = tl.load(delta_ptr + row * width + cols, mask=ok, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * width + cols, x, mask=ok)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * inverse).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * width + cols, normed.to(x.dtype), mask=ok)


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (row, BLOCK columns of I): out = silu(gate) rounded * up. PDL as in `rms_norm_kernel`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = cols < width
    gate = tl.load(gate_up_ptr + row * 2 * width + cols, mask=ok, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * width + width + cols, mask=ok, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + row * width + cols, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=ok)


@triton.jit
def norm_rotate(low, high, cos, sin, weight_ptr, eps, NORM: tl.constexpr, HALF: tl.constexpr):
    """low, high (HEADS, D / 2) of 16 bits or fp32 -> normed (NORM) and rotated, in the same dtype."""
    dtype = low.dtype
    first = low.to(tl.float32)
    second = high.to(tl.float32)
    if NORM:
        dims = tl.arange(0, HALF)
        inverse = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[
            :, None
        ]
        weight_low = tl.load(weight_ptr + dims).to(tl.float32)[None, :]
        weight_high = tl.load(weight_ptr + HALF + dims).to(tl.float32)[None, :]
        first = ((first * inverse).to(dtype).to(tl.float32) * weight_low).to(dtype).to(tl.float32)
        second = ((second * inverse).to(dtype).to(tl.float32) * weight_high).to(dtype).to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def rope_store_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_scale_ptr,
    q_ptr,
    k_pages_ptr,
    v_pages_ptr,
    params_ptr,
    static_ptr,
    num_heads,
    num_kv_heads,
    eps,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    MODE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, HEADS heads of q, of k or of v); blocks of heads are counted over q first, then k, then v."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks = (num_heads + HEADS - 1) // HEADS
    kv_blocks = (num_kv_heads + HEADS - 1) // HEADS
    dims = tl.arange(0, HALF)
    cos = tl.load(cos_ptr + token * HALF + dims)[None, :]
    sin = tl.load(sin_ptr + token * HALF + dims)[None, :]
    slot = tl.load(slots_ptr + token)
    source = qkv_ptr + token * (num_heads + 2 * num_kv_heads) * (2 * HALF)
    if block < q_blocks:
        heads = block * HEADS + tl.arange(0, HEADS)
        ok = (heads < num_heads)[:, None]
        where = heads[:, None] * (2 * HALF) + dims[None, :]
        low = tl.load(source + where, mask=ok, other=0.0)
        high = tl.load(source + where + HALF, mask=ok, other=0.0)
        low, high = norm_rotate(low, high, cos, sin, q_norm_ptr, eps, NORM, HALF)
        if SCALE:
            factor = tl.load(q_scale_ptr + token).to(low.dtype).to(tl.float32)
            low = (low.to(tl.float32) * factor).to(low.dtype)
            high = (high.to(tl.float32) * factor).to(high.dtype)
        out = q_ptr + token * num_heads * (2 * HALF) + where
        tl.store(out, low, mask=ok)
        tl.store(out + HALF, high, mask=ok)
    else:
        kv_block = block - q_blocks
        side = kv_block // kv_blocks
        heads = (kv_block - side * kv_blocks) * HEADS + tl.arange(0, HEADS)
        ok = (heads < num_kv_heads)[:, None]
        where = (num_heads + side * num_kv_heads + heads)[:, None] * (2 * HALF) + dims[None, :]
        first = tl.load(source + where, mask=ok, other=0.0)
        second = tl.load(source + where + HALF, mask=ok, other=0.0)
        if side == 0:
            first, second = norm_rotate(first, second, cos, sin, k_norm_ptr, eps, NORM, HALF)
            store_heads(
                first.to(tl.float32), second.to(tl.float32), k_pages_ptr, params_ptr, static_ptr, slot, heads,
                num_kv_heads, 0, HALF, PAGE, MODE,
            )  # fmt: skip
        else:
            store_heads(
                first.to(tl.float32), second.to(tl.float32), v_pages_ptr, params_ptr, static_ptr, slot, heads,
                num_kv_heads, 1, HALF, PAGE, MODE,
            )  # fmt: skip


def _options(num_warps: int, pdl: bool) -> dict[str, int | bool]:
    """Launch options. Fusing multiply and add is the default of today's Triton; said, since that default is about to change."""
    options: dict[str, int | bool] = {"num_warps": num_warps, "enable_fp_fusion": True}
    return options | {"launch_pdl": True} if pdl else options


def launch_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """(x + delta, or x itself without delta; its norm) on CUDA or in the interpreter, arguments checked already."""
    x = x.contiguous()
    delta = None if delta is None else delta.contiguous()
    width = x.shape[-1]
    total = x if delta is None else torch.empty_like(x)
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    if x.numel():
        rms_norm_kernel[(x.numel() // width,)](
            x,
            x if delta is None else delta,
            weight,
            total,
            out,
            width,
            eps,
            ADD=delta is not None,
            BLOCK=block,
            PDL=pdl,
            **_options(min(max(block // 512, 1), 16), pdl),
        )
    return total, out


def launch_silu_mul(gate_up: Tensor, pdl: bool = False) -> Tensor:
    """`silu_mul` on CUDA or in the interpreter, arguments checked already."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    block = 512 if tokens < 16 else 1024
    if out.numel():
        silu_mul_kernel[(tokens, triton.cdiv(width, block))](
            gate_up, out, width, BLOCK=block, PDL=pdl, **_options(block // 256, pdl)
        )
    return out


def launch_rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    slot_mapping: Tensor,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    q_scale: Tensor | None,
    pdl: bool = False,
) -> Tensor:
    """`rope_store` on CUDA or in the interpreter, arguments checked already."""
    tokens, num_kv_heads, head_dim = qkv.shape[0], cache.num_kv_heads, cache.head_dim
    if head_dim not in (32, 64, 128, 256):
        raise ValueError(f"head_dim {head_dim}: the kernel takes 32, 64, 128 or 256.")
    q = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    heads = 1 if tokens * num_heads <= ONE_HEAD_PROGRAMS else 8
    blocks = triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads)
    if tokens:
        rope_store_kernel[(tokens, blocks)](
            qkv,
            cos.contiguous(),
            sin.contiguous(),
            slot_mapping,
            qkv if q_norm is None else q_norm,
            qkv if k_norm is None else k_norm,
            cos if q_scale is None else q_scale,
            q,
            *cache_pointers(cache),
            num_heads,
            num_kv_heads,
            eps,
            NORM=q_norm is not None,
            SCALE=q_scale is not None,
            HEADS=heads,
            HALF=head_dim // 2,
            PAGE=cache.block_size,
            MODE=cache_mode(cache),
            PDL=pdl,
            **_options(1 if heads == 1 else 2, pdl),
        )
    return q
