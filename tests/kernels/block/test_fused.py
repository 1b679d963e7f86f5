"""Norms, RoPE with the KV store and SiLU: kernels (in the interpreter) against the torch references, those against torch."""

import pytest
import torch
import torch.nn.functional as F

from kernels.block import fused, fused_triton
from kernels.block.fused_triton import launch_rms_norm, launch_rope_store, launch_silu_mul
from kernels.kv.int8 import dequantize_kv, unpack_halves
from kernels.kv.pages import KVCache, StaticKV, allocate_cache
from kernels.w4a16.prefill import launch_silu_pairs

HALF_ULP = 2**-10  # one unit in the last place of fp16: the two may round a sum to neighbours


@pytest.mark.parametrize("width", [576, 64, 33])
@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_rms_norm_kernel(width: int, has_delta: bool, weight_dtype: torch.dtype):
    torch.manual_seed(0)
    x, delta, weight = torch.randn(3, width).half(), torch.randn(3, width).half(), torch.randn(width)
    weight = weight.to(weight_dtype)
    total, out = launch_rms_norm(x, delta if has_delta else None, weight, 1e-5)
    if has_delta:
        expected_total, expected = fused.add_rms_norm(x, delta, weight, 1e-5)
    else:
        expected_total, expected = x, fused.rms_norm(x, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert torch.allclose(out.float(), expected.float(), rtol=2 * HALF_ULP, atol=1e-6)


@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (3, 700), (5, 1024)])
def test_silu_of_alternating_columns(tokens: int, width: int):
    pairs = torch.randn(tokens, 2 * width).half()
    out = torch.full((tokens, width), float("nan"), dtype=torch.float16)
    launch_silu_pairs(pairs, out)
    expected = F.silu(pairs[:, 0::2]) * pairs[:, 1::2]
    assert torch.allclose(out.float(), expected.float(), rtol=2 * HALF_ULP, atol=1e-6)


def test_rms_norm_reference_is_torchs():
    x, weight = torch.randn(4, 5, 64), torch.randn(64)
    assert torch.allclose(fused.rms_norm(x, weight, 1e-5), F.rms_norm(x, (64,), weight, 1e-5), atol=1e-6)


@pytest.mark.parametrize(("tokens", "width"), [(1, 1100), (17, 96)])
def test_silu_mul_kernel(tokens: int, width: int):
    torch.manual_seed(0)
    gate_up = (torch.randn(tokens, 2 * width) * 4).half()
    ours = launch_silu_mul(gate_up).float()
    assert torch.allclose(ours, fused.silu_mul(gate_up).float(), rtol=2 * HALF_ULP, atol=1e-6)


def make_cache(kind: str, heads: int = 2, head_dim: int = 32) -> KVCache:
    static = StaticKV(*(torch.full((heads,), x) for x in (0.03, 0.1, 0.02, -0.1)))
    return allocate_cache(
        4, heads, head_dim, 16 if kind == "float" else 8, torch.float16, "cpu", block_size=16,
        static=static if kind == "static" else None,
    )  # fmt: skip


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("kind", ["float", "dynamic", "static"])
@pytest.mark.parametrize("limit", [2048, 0], ids=["one-head", "eight-heads"])
def test_rope_store_kernel(kind: str, has_norm: bool, limit: int, monkeypatch: pytest.MonkeyPatch):
    """With a limit of 0 a program takes 8 heads, more than there are. Norms are float32 there, as some families have them."""
    monkeypatch.setattr(fused_triton, "ONE_HEAD_PROGRAMS", limit)
    tokens = 3
    torch.manual_seed(0)
    ours, reference = make_cache(kind), make_cache(kind)
    qkv = torch.randn(tokens, (4 + 2 * 2) * 32).half()
    angles = torch.rand(tokens, 16) * 100
    slots = torch.tensor([63, -1, 17])
    norm_dtype = torch.float16 if limit else torch.float32
    q_norm, k_norm = ((torch.rand(32) + 0.5).to(norm_dtype) for _ in range(2))
    norms = (q_norm, k_norm) if has_norm else (None, None)
    q_scale = torch.rand(tokens) + 1 if has_norm else None
    q = launch_rope_store(qkv, angles.cos(), angles.sin(), ours, slots, 4, *norms, 1e-6, q_scale)
    expected = fused.rope_store(
        qkv, angles.cos(), angles.sin(), reference, slots, q_norm=norms[0], k_norm=norms[1], q_scale=q_scale
    )
    assert torch.allclose(q.float(), expected.float(), rtol=2 * HALF_ULP, atol=2e-3)
    assert ours.k.ne(0).any() and ours.v.ne(0).any()
    if kind == "float":
        assert torch.allclose(ours.k.float(), reference.k.float(), rtol=2 * HALF_ULP, atol=2e-3)
        assert torch.equal(ours.v, reference.v)
    else:
        # k may round to a neighbour before it is quantized, and so to a neighbouring code; v is not touched before that
        codes = [unpack_halves(c.k).int() for c in (ours, reference)]
        assert (codes[0] - codes[1]).abs().max() <= 1
        assert torch.equal(ours.v, reference.v)
    if ours.params is not None and reference.params is not None:
        assert torch.allclose(ours.params.float(), reference.params.float(), rtol=4 * HALF_ULP, atol=1e-4)


def test_rotation_and_stored_keys_by_hand():
    """A quarter turn maps pair (x, y) to (-y, x); k is stored turned, v as it is, both within a step of int8."""
    cache = make_cache("dynamic", heads=1)
    qkv = torch.randn(1, 3 * 32)
    quarter = torch.full((1, 16), torch.pi / 2)
    q = fused.rope_store(qkv, quarter.cos(), quarter.sin(), cache, torch.tensor([5]))
    x, k, v = qkv.view(3, 32)
    turned = torch.cat([-x[16:], x[:16]])
    assert torch.allclose(q[0, 0], turned, atol=1e-6)
    assert cache.params is not None
    for side, expected in ((0, torch.cat([-k[16:], k[:16]])), (1, v)):
        scale, zero = cache.params[0, 0, side, 5]
        words = (cache.k, cache.v)[side][0, 0, 5]
        held = dequantize_kv(unpack_halves(words), scale[None].squeeze(), zero[None].squeeze())
        assert torch.allclose(held, expected, atol=0.02)


def test_arguments_that_do_not_fit_are_refused():
    cache = make_cache("dynamic")
    qkv, angles, slots = torch.randn(2, 8 * 32), torch.rand(2, 16), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="no query heads"):
        fused.rope_store(qkv[:, : 4 * 32].contiguous(), angles, angles, cache, slots)
    with pytest.raises(ValueError, match="cos is"):
        fused.rope_store(qkv, angles[:1], angles, cache, slots)
    with pytest.raises(ValueError, match="slot_mapping"):
        fused.rope_store(qkv, angles, angles, cache, slots.int())
    with pytest.raises(ValueError, match="both or neither"):
        fused.rope_store(qkv, angles, angles, cache, slots, q_norm=torch.ones(32))
    with pytest.raises(ValueError, match="weight is"):
        fused.rms_norm(qkv, torch.ones(3), 1e-5)
    with pytest.raises(ValueError, match="delta is"):
        fused.add_rms_norm(qkv, qkv[:1], torch.ones(8 * 32), 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        fused.silu_mul(torch.randn(2, 7))
