"""What stands between the products of a decoder block, each as one kernel: norms, residual sums, RoPE with the KV store, SiLU.

T tokens, H hidden size, I intermediate size, Hq query and Hkv key/value heads, D head_dim. Every function rounds where the torch
reference of the same name rounds, so the two differ by the rounding of sums only. CPU tensors take the references, CUDA tensors
the Triton kernels of `fused_triton.py`. `pdl` asks for programmatic dependent launch: the kernel may start while its predecessor
drains; it pays where most kernels of a captured step do so. A norm and `silu_mul` let the kernel behind them start before they wait
themselves, so what follows must read nothing but weights before its own wait: the products do so, and attention never follows. Knows nothing of blocks or weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.kv.int8 import store_kv_reference
from kernels.kv.pages import KVCache


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps), rounded, times weight, over the last axis: x (..., H), weight (H,) of x's dtype or float32."""
    _check_norm(x, weight)
    if x.is_cuda:
        from kernels.block.fused_triton import launch_rms_norm

        return launch_rms_norm(x, None, weight, eps, pdl)[1]
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMS norm), both (..., H): the residual stream and the input of the next products."""
    _check_norm(x, weight)
    if delta.shape != x.shape or delta.dtype != x.dtype or delta.device != x.device:
        raise ValueError(
            f"delta is {tuple(delta.shape)} {delta.dtype} on {delta.device}, expected {tuple(x.shape)} {x.dtype} on {x.device}."
        )
    if x.is_cuda:
        from kernels.block.fused_triton import launch_rms_norm

        return launch_rms_norm(x, delta, weight, eps, pdl)
    total = x + delta
    return total, rms_norm_reference(total, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same as `rms_norm` in torch."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (normed * weight).to(x.dtype)


def _check_norm(x: Tensor, weight: Tensor) -> None:
    is_other = weight.dtype not in (x.dtype, torch.float32)
    if weight.shape != x.shape[-1:] or is_other or weight.device != x.device:
        raise ValueError(
            f"weight is {tuple(weight.shape)} {weight.dtype} on {weight.device}, expected {tuple(x.shape[-1:])} {x.dtype} "
            f"or float32 on {x.device}."
        )


def silu_mul(gate_up: Tensor, *, pdl: bool = False) -> Tensor:
    """silu(gate), rounded, times up, for gate_up (T, 2 I) contiguous, gate first: (T, I)."""
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}, expected contiguous (T, 2 I).")
    if gate_up.is_cuda:
        from kernels.block.fused_triton import launch_silu_mul

        return launch_silu_mul(gate_up, pdl)
    return silu_mul_reference(gate_up)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """The same as `silu_mul` in torch."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    slot_mapping: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    q_scale: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Rotate q and k, store k and v in the cache, return q (T, Hq, D): all that lies between the qkv product and attention.

    Args:
        qkv: (T, (Hq + 2 Hkv) * D), heads of q, then k, then v, contiguous; bias already added.
        cos, sin: (T, D / 2) fp32, the angles of each token; pair j of a head is (x[j], x[j + D / 2]).
        slot_mapping: (T,) int64, where each token goes; negative: its k and v are not stored.
        q_norm, k_norm: (D,) of qkv's dtype or float32, RMS norm of each head before the rotation (Qwen3); both or neither.
        q_scale: (T,) fp32, factor on the rotated q (log-n attention).

    k is rounded to qkv's dtype before it is quantized, as in `store_kv(apply_rope(k))`. Raises ValueError on anything else.
    """
    num_heads = check_rope_store(qkv, cos, sin, cache, slot_mapping, q_norm, k_norm, q_scale)
    if qkv.is_cuda:
        from kernels.block.fused_triton import launch_rope_store

        return launch_rope_store(
            qkv, cos, sin, cache, slot_mapping, num_heads, q_norm, k_norm, eps, q_scale, pdl
        )
    return rope_store_reference(qkv, cos, sin, cache, slot_mapping, q_norm, k_norm, eps, q_scale)


def check_rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    slot_mapping: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    q_scale: Tensor | None,
) -> int:
    """Raise ValueError unless the arguments fit together; the number of query heads."""
    head_dim, num_kv_heads = cache.head_dim, cache.num_kv_heads
    if qkv.ndim != 2 or qkv.shape[1] % head_dim or not qkv.is_contiguous():
        raise ValueError(f"qkv is {tuple(qkv.shape)}, expected contiguous (T, heads * {head_dim}).")
    tokens, num_heads = qkv.shape[0], qkv.shape[1] // head_dim - 2 * num_kv_heads
    if num_heads < 1:
        raise ValueError(
            f"qkv is {tuple(qkv.shape)}: no query heads are left beside {num_kv_heads} keys and values."
        )
    for name, part in (("cos", cos), ("sin", sin)):
        if tuple(part.shape) != (tokens, head_dim // 2) or part.dtype != torch.float32:
            raise ValueError(
                f"{name} is {tuple(part.shape)} {part.dtype}, expected ({tokens}, {head_dim // 2}) float32."
            )
    if slot_mapping is not None and (
        tuple(slot_mapping.shape) != (tokens,) or slot_mapping.dtype != torch.int64
    ):
        raise ValueError(
            f"slot_mapping is {tuple(slot_mapping.shape)} {slot_mapping.dtype}, expected ({tokens},) int64."
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm: expected both or neither.")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is None:
            continue
        if tuple(weight.shape) != (head_dim,) or weight.dtype not in (qkv.dtype, torch.float32):
            raise ValueError(
                f"{name} is {tuple(weight.shape)} {weight.dtype}, expected ({head_dim},) {qkv.dtype} or float32."
            )
    if q_scale is not None and (tuple(q_scale.shape) != (tokens,) or q_scale.dtype != torch.float32):
        raise ValueError(f"q_scale is {tuple(q_scale.shape)} {q_scale.dtype}, expected ({tokens},) float32.")
    given = [cos, sin, cache.k, *(x for x in (slot_mapping, q_norm, k_norm, q_scale) if x is not None)]
    if any(x.device != qkv.device for x in given):
        raise ValueError(f"qkv lies on {qkv.device} and another argument elsewhere: expected one device.")
    return num_heads


def rope_store_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    slot_mapping: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    q_scale: Tensor | None = None,
) -> Tensor:
    """The same as `rope_store` in torch."""
    num_kv_heads = cache.num_kv_heads
    heads = qkv.unflatten(-1, (-1, cache.head_dim))  # (T, Hq + 2 Hkv, D)
    q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), 1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_reference(q, q_norm, eps), rms_norm_reference(k, k_norm, eps)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    if q_scale is not None:
        q = q * q_scale.to(q.dtype)[:, None, None]
    store_kv_reference(cache, k, v, slot_mapping)
    return q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, heads, D) with pair j = (x[j], x[j + D / 2]) turned by the token's angle, in fp32, back in the dtype of x."""
    first, second = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
