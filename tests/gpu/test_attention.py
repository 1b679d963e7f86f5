"""The paged attention kernels as the GPU runs them: both dtypes, all cache kinds, real head layouts, captured in a graph."""

import pytest
import torch
from torch import Tensor

from kernels.attention.launch import launch_decode
from kernels.attention.paged import (
    allocate_workspace,
    decode_attention,
    decode_attention_reference,
    prefill_attention,
    rope_decode_attention,
)
from kernels.block.fused import (
    add_rms_norm,
    rms_norm,
    rms_norm_reference,
    rope_store,
    rope_store_reference,
    silu_mul,
    silu_mul_reference,
)
from kernels.kv.int8 import gather_kv, gather_kv_reference, store_kv, store_kv_reference
from kernels.kv.pages import KVCache, StaticKV, allocate_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYOUTS = {"7b": (32, 32, 128), "70b": (64, 8, 128), "small": (9, 3, 64)}


def make_cache(kind: str, blocks: int, heads: int, head_dim: int, dtype: torch.dtype) -> KVCache:
    static = StaticKV(*(torch.full((heads,), x) for x in (0.03, 0.1, 0.02, -0.1)))
    return allocate_cache(
        blocks, heads, head_dim, 16 if kind == "float" else 8, dtype, "cuda", static=static if kind == "static" else None
    )  # fmt: skip


def filled(
    kind: str, lens: list[int], heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[KVCache, Tensor, Tensor]:
    """Cache with NaN in unused slots where the format can hold it, shuffled block tables with -1 past the end, lengths."""
    torch.manual_seed(0)
    pages = max(-(-n // 64) for n in lens) + 1
    cache = make_cache(kind, len(lens) * pages, heads, head_dim, dtype)
    for part in (cache.k, cache.v) if kind == "float" else () if cache.params is None else (cache.params,):
        part.fill_(float("nan"))
    order = torch.randperm(len(lens) * pages).view(len(lens), pages).int()
    tables = torch.full_like(order, -1)
    for row, length in enumerate(lens):
        used = -(-length // 64)
        tables[row, :used] = order[row, :used]
        token = torch.arange(length)
        slots = (tables[row].long()[token // 64] * 64 + token % 64).cuda()
        k = torch.randn(length, heads, head_dim, device="cuda", dtype=dtype)
        store_kv(cache, k, torch.randn_like(k) + 0.3, slots)
    return cache, tables.cuda(), torch.tensor(lens, dtype=torch.int32, device="cuda")


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["float", "dynamic", "static"])
@pytest.mark.parametrize(
    ("layout", "lens", "window"),
    [
        ("7b", [1, 64, 65, 700, 0, 4096, 3, 200], None),
        ("70b", [1, 64, 65, 700, 0, 4096, 3, 200], None),
        ("70b", [5000], None),
        ("7b", [2000], None),
        ("7b", [90, 3000], 1000),
        ("small", [33, 500], None),
    ],
)
def test_decode_equals_the_reference(
    layout: str, lens: list[int], window: int | None, kind: str, dtype: torch.dtype
):
    num_heads, heads, head_dim = LAYOUTS[layout]
    cache, tables, context_lens = filled(kind, lens, heads, head_dim, dtype)
    q = torch.randn(len(lens), num_heads, head_dim, device="cuda", dtype=dtype)
    scale = head_dim**-0.5
    expected = decode_attention_reference(q, cache, tables, context_lens, scale, window)
    workspace = allocate_workspace(len(lens), num_heads, heads, head_dim, "cuda")
    for fused_merge in (True, False):
        out = torch.full_like(q, float("nan"))
        launch_decode(q, cache, tables, context_lens, scale, window, workspace, out, fused_merge=fused_merge)
        assert relative(out, expected) < (1e-3 if dtype == torch.float16 else 6e-3)
        assert workspace.arrivals.eq(0).all()
        again = launch_decode(
            q, cache, tables, context_lens, scale, window, workspace, None, fused_merge=fused_merge
        )
        assert torch.equal(out, again)


@pytest.mark.parametrize("pdl", [False, True])
def test_one_graph_serves_other_lengths(pdl: bool):
    num_heads, heads, head_dim = LAYOUTS["70b"]
    cache, tables, context_lens = filled("dynamic", [700, 3000, 65], heads, head_dim, torch.float16)
    q = torch.randn(3, num_heads, head_dim, device="cuda", dtype=torch.float16)
    workspace = allocate_workspace(3, num_heads, heads, head_dim, "cuda")
    out = torch.empty_like(q)

    def step() -> None:
        launch_decode(q, cache, tables, context_lens, 0.1, None, workspace, out, pdl=pdl)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            step()
    for lens in ([1, 1, 1], [700, 3000, 65], [0, 2999, 64]):
        context_lens.copy_(torch.tensor(lens))
        graph.replay()
        expected = decode_attention_reference(q, cache, tables, context_lens, 0.1)
        assert relative(out, expected) < 1e-3
        assert torch.equal(out, decode_attention(q, cache, tables, context_lens, 0.1, workspace=workspace))


@pytest.mark.parametrize("kind", ["float", "dynamic", "static"])
def test_store_and_gather_equal_the_references(kind: str):
    torch.manual_seed(0)
    ours, reference = (make_cache(kind, 20, 8, 128, torch.float16) for _ in range(2))
    k, v = (torch.randn(900, 8, 128, device="cuda", dtype=torch.float16) * 3 for _ in range(2))
    slots = torch.randperm(20 * 64, device="cuda")[:900]
    slots[::50] = -1
    store_kv(ours, k, v, slots)
    store_kv_reference(reference, k, v, slots)
    assert torch.equal(ours.k, reference.k) and torch.equal(ours.v, reference.v)
    if ours.params is not None and reference.params is not None:
        assert torch.equal(ours.params.view(torch.int32), reference.params.view(torch.int32))
    table = torch.randperm(20, device="cuda").int()
    for mine, theirs in zip(
        gather_kv(ours, table, 777), gather_kv_reference(ours, table, 777, torch.float16), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("kind", ["float", "dynamic"])
def test_prefill_equals_decode_of_its_last_tokens(kind: str, window: int | None):
    num_heads, heads, head_dim = LAYOUTS["70b"]
    cache, tables, _ = filled(kind, [300, 70], heads, head_dim, torch.float16)
    q = torch.randn(100 + 70, num_heads, head_dim, device="cuda", dtype=torch.float16)
    ours = prefill_attention(q, cache, tables, [100, 70], [300, 70], 0.1, window)
    for row, end, length in ((0, 100, 300), (1, 170, 70)):
        for back in (1, 30, 69):
            lens = torch.tensor([length - back + 1], dtype=torch.int32, device="cuda")
            one = q[end - back : end - back + 1]
            expected = decode_attention_reference(one, cache, tables[row : row + 1], lens, 0.1, window)
            assert relative(ours[end - back], expected[0]) < 2e-3


def test_prefill_within_a_window_holds_no_scores():
    """With shared heads and a mask torch may fall back to a path that holds them all: (Hq, T, L), here 268 MB in fp16."""
    num_heads, heads, head_dim = LAYOUTS["70b"]
    cache, tables, _ = filled("float", [4096], heads, head_dim, torch.float16)
    q = torch.randn(512, num_heads, head_dim, device="cuda", dtype=torch.float16)
    prefill_attention(q, cache, tables, [512], [4096], 0.1, 1000)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prefill_attention(q, cache, tables, [512], [4096], 0.1, 1000)
    assert torch.cuda.max_memory_allocated() - before < 220e6  # keys and values of all heads: 134 MB


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("kind", ["float", "dynamic", "static"])
@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rope_store_equals_the_reference(kind: str, tokens: int, has_norm: bool, pdl: bool):
    torch.manual_seed(0)
    num_heads, heads, head_dim = LAYOUTS["70b"]
    ours, reference = (make_cache(kind, 20, heads, head_dim, torch.float16) for _ in range(2))
    qkv = torch.randn(tokens, (num_heads + 2 * heads) * head_dim, device="cuda", dtype=torch.float16)
    angles = torch.rand(tokens, head_dim // 2, device="cuda") * 1000
    slots = torch.randperm(20 * 64, device="cuda")[:tokens]
    norm = torch.rand(head_dim, device="cuda", dtype=torch.float16) + 0.5 if has_norm else None
    q = rope_store(qkv, angles.cos(), angles.sin(), ours, slots, q_norm=norm, k_norm=norm, pdl=pdl)
    expected = rope_store_reference(qkv, angles.cos(), angles.sin(), reference, slots, norm, norm)
    assert relative(q, expected) < 5e-4
    held = gather_kv_reference(ours, torch.arange(20, device="cuda"), 1280, torch.float32)
    wanted = gather_kv_reference(reference, torch.arange(20, device="cuda"), 1280, torch.float32)
    assert relative(held[0], wanted[0]) < 2e-3  # k: one code in a few hundred is a neighbour
    assert relative(held[1], wanted[1]) < 1e-6


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("kind", ["float", "dynamic", "static"])
@pytest.mark.parametrize(("layout", "lens"), [("7b", [700]), ("70b", [1, 64, 65, 3000, 0])])
def test_rope_and_store_in_the_attention_kernel(layout: str, lens: list[int], kind: str, pdl: bool):
    num_heads, heads, head_dim = LAYOUTS[layout]
    cache, tables, context_lens = filled(kind, lens, heads, head_dim, torch.float16)
    twin, _, _ = filled(kind, lens, heads, head_dim, torch.float16)
    qkv = torch.randn(len(lens), (num_heads + 2 * heads) * head_dim, device="cuda", dtype=torch.float16)
    angles = torch.rand(len(lens), head_dim // 2, device="cuda") * 1000
    cos, sin = angles.cos(), angles.sin()
    ours = rope_decode_attention(qkv, cos, sin, cache, tables, context_lens, 0.1, pdl=pdl)
    last = (context_lens.long() - 1).clamp(min=0)
    slots = tables.gather(1, last[:, None] // 64)[:, 0].long() * 64 + last % 64
    q = rope_store_reference(qkv, cos, sin, twin, torch.where(context_lens > 0, slots, -1))
    expected = decode_attention_reference(q, twin, tables, context_lens, 0.1)
    assert relative(ours, expected) < 2e-3
    assert torch.equal(cache.v.nan_to_num(), twin.v.nan_to_num())
    again = rope_decode_attention(qkv, cos, sin, cache, tables, context_lens, 0.1, pdl=pdl)
    assert torch.equal(ours, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pdl", [False, True])
def test_norms_and_silu_equal_the_references(dtype: torch.dtype, pdl: bool):
    torch.manual_seed(0)
    bound = 2e-4 if dtype == torch.float16 else 2e-3
    for tokens, width in ((1, 4096), (33, 8192), (7, 576)):
        x, delta = (torch.randn(tokens, width, device="cuda", dtype=dtype) for _ in range(2))
        weight = torch.rand(width, device="cuda", dtype=dtype) + 0.5
        assert relative(rms_norm(x, weight, 1e-5, pdl=pdl), rms_norm_reference(x, weight, 1e-5)) < bound
        total, normed = add_rms_norm(x, delta, weight, 1e-5, pdl=pdl)
        assert torch.equal(total, x + delta)
        assert relative(normed, rms_norm_reference(x + delta, weight, 1e-5)) < bound
    for tokens, width in ((1, 11008), (64, 28672)):
        gate_up = torch.randn(tokens, 2 * width, device="cuda", dtype=dtype) * 3
        assert relative(silu_mul(gate_up, pdl=pdl), silu_mul_reference(gate_up)) < bound
