"""Int8 keys and values: rounding against closed forms, the page layout against hand-written words, kernels against torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv import int8 as kv8
from kernels.kv import pages as kv_cache
from kernels.kv.int8_triton import launch_gather, launch_store
from kernels.kv.pages import KVCache, StaticKV, allocate_cache


def random_static(heads: int) -> StaticKV:
    torch.manual_seed(1)
    return StaticKV(
        torch.rand(heads) * 0.03 + 0.01, torch.randn(heads), torch.rand(heads) * 0.03, torch.randn(heads)
    )


def make_cache(kind: str, blocks: int = 6, heads: int = 3, head_dim: int = 32) -> KVCache:
    static = random_static(heads) if kind == "static" else None
    return allocate_cache(
        blocks,
        heads,
        head_dim,
        16 if kind == "float" else 8,
        torch.float16,
        "cpu",
        block_size=16,
        static=static,
    )


def test_codes_of_a_hand_written_token():
    """Range -1 .. 1.55 has scale 0.01 and zero 0.28; code 0 is the minimum, 255 the maximum."""
    x = torch.tensor([[-1.0, 1.55, 0.28, 0.285]])
    codes, scale, zero = kv8.quantize_kv(x)
    assert codes.tolist() == [[0, 255, 128, 128]]
    assert scale.dtype == zero.dtype == torch.float16
    assert scale.item() == pytest.approx(0.01, rel=1e-3) and zero.item() == pytest.approx(0.28, rel=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_error_is_at_most_half_a_step(bits: int):
    torch.manual_seed(0)
    x = torch.randn(50, 4, 64) * torch.logspace(-3, 3, 50)[:, None, None]
    codes, scale, zero = kv8.quantize_kv(x, bits)
    error = (kv8.dequantize_kv(codes, scale, zero, bits) - x).abs().amax(-1)
    # half a step of rounding, plus what rounding scale and zero to fp16 moves the ends of the range: 2^-11 of half the range
    # for the scale and 2^-11 of |zero| for the zero
    bound = scale.float() * (0.5 + 2 ** (bits - 1) * 2**-11) + zero.float().abs() * 2**-11
    assert (error <= bound * 1.001 + 1e-7).all()
    assert codes.max() == 2**bits - 1 and codes.min() == 0


@pytest.mark.parametrize("value", [0.0, 3.0, -65504.0, 1e-7])
def test_constant_token_is_finite(value: float):
    x = torch.full((2, 1, 32), value)
    codes, scale, zero = kv8.quantize_kv(x)
    back = kv8.dequantize_kv(codes, scale, zero)
    assert torch.isfinite(back).all()
    assert torch.allclose(back, x, rtol=2**-10, atol=1e-5)


def test_static_parameters_are_used_as_given():
    x = torch.tensor([[[0.0, 0.5, 9.0, -9.0]]])
    codes, _, _ = kv8.quantize_kv(x, 8, torch.tensor([0.5]), torch.tensor([0.25]))
    assert codes.tolist() == [
        [[128, 128, 146, 110]]
    ]  # -0.5, 0.5 steps round to even 0; 17.5 -> 18; -18.5 -> -18
    scale, zero = kv8.kv_qparams(torch.tensor([-2.0]), torch.tensor([3.1]))
    assert scale.item() == pytest.approx(0.02) and zero.item() == pytest.approx(0.56)


def test_word_holds_channels_half_a_head_apart():
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 255, 128], dtype=torch.uint8)
    words = kv8.pack_halves(codes)
    assert [w & 0xFFFF for w in words.tolist()] == [0x0501, 0x0602, 0xFF03, 0x8004]
    assert torch.equal(kv8.unpack_halves(words), codes)


@given(st.lists(st.integers(0, 255), min_size=2, max_size=64).filter(lambda c: len(c) % 2 == 0))
@settings(max_examples=30, deadline=None)
def test_packing_is_reversible(codes: list[int]):
    tensor = torch.tensor(codes, dtype=torch.uint8)
    assert torch.equal(kv8.unpack_halves(kv8.pack_halves(tensor)), tensor)


@pytest.mark.parametrize("kind", ["float", "dynamic", "static"])
def test_store_kernel_equals_the_reference_bit_for_bit(kind: str):
    torch.manual_seed(2)
    ours, reference = make_cache(kind), make_cache(kind)
    k, v = torch.randn(9, 3, 32).half(), torch.randn(9, 3, 32).half() * 5
    k[0] = 0.0  # a constant token
    v[1, 0, 3] = 60000.0  # an outlier near fp16's end
    slots = torch.tensor([5, 17, -1, 95, 0, 31, 32, -1, 64])
    launch_store(ours, k, v, slots)
    kv8.store_kv_reference(reference, k, v, slots)
    assert torch.equal(ours.k, reference.k) and torch.equal(ours.v, reference.v)
    if ours.params is not None and reference.params is not None:
        assert torch.equal(ours.params.view(torch.int32), reference.params.view(torch.int32))


@pytest.mark.parametrize("kind", ["float", "dynamic", "static"])
def test_gather_kernel_equals_the_reference(kind: str):
    torch.manual_seed(3)
    cache = make_cache(kind)
    k, v = torch.randn(40, 3, 32), torch.randn(40, 3, 32)
    table = torch.tensor([4, 1, 3], dtype=torch.int32)
    token = torch.arange(40)
    kv8.store_kv(cache, k, v, table[token // 16].long() * 16 + token % 16)
    ours = launch_gather(cache, table, 37, torch.float16)
    expected = kv8.gather_kv_reference(cache, table, 37, torch.float16)
    for mine, theirs in zip(ours, expected, strict=True):
        # a fused multiply-add against two roundings in fp32: one unit of fp16 at most
        assert torch.allclose(mine.float(), theirs.float(), rtol=2**-10, atol=1e-6)
    assert torch.allclose(expected[0].float(), k[:37].transpose(0, 1), atol=3.0 if kind == "static" else 0.05)


def test_bytes_of_a_page_are_those_allocated():
    for kind, is_static in (("float", False), ("dynamic", False), ("static", True)):
        cache = make_cache(kind, blocks=1)
        held = cache.k.nbytes + cache.v.nbytes + (0 if cache.params is None else cache.params.nbytes)
        size = kv_cache.cache_block_bytes(3, 32, cache.bits, block_size=16, is_static=is_static)
        assert held == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_bits": 4}, "kv_bits 4"),
        ({"block_size": 24}, "power of two"),
        ({"head_dim": 33}, "even head_dim"),
        ({"static": random_static(5)}, "expected (3,)"),
        ({"kv_bits": 16, "static": random_static(3)}, "belong to kv_bits 8"),
        ({"num_blocks": 0}, "at least 1"),
    ],
)
def test_impossible_caches_are_refused(change: dict[str, object], message: str):
    arguments = {"num_blocks": 2, "num_kv_heads": 3, "head_dim": 32, "kv_bits": 8, "dtype": torch.float16}
    with pytest.raises(ValueError) as caught:
        allocate_cache(**{**arguments, "device": "cpu", **change})
    assert message in str(caught.value)


def test_arguments_that_do_not_fit_are_refused():
    cache = make_cache("dynamic")
    k, slots = torch.randn(4, 3, 32), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected floats \(T, Hkv, D\)"):
        kv8.store_kv(cache, k[:, :2], k, slots)
    with pytest.raises(ValueError, match=r"expected \(4,\) torch.int64"):
        kv8.store_kv(cache, k, k, slots.int())
    with pytest.raises(ValueError, match="17 tokens need"):
        kv8.gather_kv(cache, torch.zeros(1, dtype=torch.int32), 17)
    with pytest.raises(ValueError, match="8 or 4 bits"):
        kv8.quantize_kv(k, 3)
    with pytest.raises(ValueError, match="both scale and zero"):
        kv8.quantize_kv(k, 8, torch.ones(3))
