"""Products of experts on a GPU: every tile kind and size against float64, the table's own choice, CUDA graphs, equal bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int4 import Quantized
from kernels.moe.few import FewTile
from kernels.moe.many import ManyTile
from kernels.moe.product import Entry, moe_mlp, run_tiles
from kernels.moe.weights import ExpertWeights, stack, stack_floats
from kernels.w4a16.layout import W4Weight, pair, prepare, restore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {
    torch.float16: 1.5e-3,
    torch.bfloat16: 8e-3,
}  # two roundings of outputs and, in `many`, one of weights
SHAPES = {  # experts, k, H, I
    "qwen3-30b": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
    "ragged": (6, 3, 1056, 352),
}
TILES = {
    "few": Entry(0, FewTile(64, 4, 4), FewTile(32, 2, 3)),
    "few-4": Entry(0, FewTile(128, 4, 3, 4), FewTile(64, 4, 3, 2)),
    "many": Entry(0, ManyTile(64, 128, 4, 3), ManyTile(64, 128, 4, 3)),
    "many-16": Entry(0, ManyTile(16, 64, 4, 4), ManyTile(128, 128, 8, 3)),
}


def operands(
    shape: str, group_size: int, dtype: torch.dtype | None = None
) -> tuple[ExpertWeights, ExpertWeights]:
    """Random experts on the GPU: int4, or floats of `dtype`."""
    count, _, hidden, inner = SHAPES[shape]
    generator = torch.Generator(device="cuda").manual_seed(5)

    def one(rows: int, cols: int) -> W4Weight:
        groups = -(-cols // group_size)
        codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, device="cuda", generator=generator)
        zeros = torch.randint(4, 12, (rows, groups), dtype=torch.uint8, device="cuda", generator=generator)
        scales = (torch.rand(rows, groups, device="cuda", generator=generator) * 0.01 + 0.002).half()
        return prepare(Quantized(codes, scales, zeros, group_size))

    gates, ups = ([one(inner, hidden) for _ in range(count)] for _ in range(2))
    downs = [one(hidden, inner) for _ in range(count)]
    if dtype is None:
        return stack([pair(gate, up) for gate, up in zip(gates, ups, strict=True)]), stack(downs)
    floats = [[restore(w).dequantize(dtype) for w in part] for part in (gates, ups, downs)]
    return stack_floats(floats[0], floats[1]), stack_floats(floats[2])


def inputs(shape: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, chosen with a favourite among the experts, weights."""
    count, topk, hidden, _ = SHAPES[shape]
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    x = (torch.randn(tokens, hidden, device="cuda", generator=generator) * 0.1).to(dtype)
    scores = torch.rand(tokens, count, device="cuda", generator=generator)
    scores[:, 1] += 0.5
    weights, chosen = scores.topk(topk, dim=1)
    return x, chosen, weights / weights.sum(1, keepdim=True)


def expected(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: ExpertWeights, down: ExpertWeights
) -> Tensor:
    out = torch.zeros(x.shape[0], down.rows, dtype=torch.float64, device="cuda")
    for expert in chosen.unique().tolist():
        tokens, place = torch.where(chosen == expert)
        first, second = (
            restore(one).dequantize().double() if isinstance(one, W4Weight) else one.double()
            for one in (gate_up.of_expert(expert), down.of_expert(expert))
        )
        product = x[tokens].double() @ first.t()
        inner = F.silu(product[:, 0::2]) * product[:, 1::2]
        out.index_add_(0, tokens, (inner @ second.t()) * weights[tokens, place, None].double())
    return out


def assert_close(out: Tensor, reference: Tensor) -> None:
    assert torch.isfinite(out).all()
    error = (out.double() - reference).norm(dim=1) / reference.norm(dim=1)
    assert error.max() < TOLERANCE[out.dtype], float(error.max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(("shape", "group_size"), [("qwen3-30b", 128), ("ragged", 32), ("mixtral", 64)])
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_tiles_equal_float64(
    shape: str, group_size: int, tiles: str, tokens: int, dtype: torch.dtype
) -> None:
    gate_up, down = operands(shape, group_size)
    x, chosen, weights = inputs(shape, tokens, dtype)
    out = run_tiles(x, chosen, weights, gate_up, down, TILES[tiles])
    assert_close(out, expected(x, chosen, weights, gate_up, down))
    again = run_tiles(x, chosen, weights, gate_up, down, TILES[tiles])
    assert torch.equal(out, again)


@pytest.mark.parametrize("tiles", ["few", "many"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_float_experts_equal_float64(tiles: str, dtype: torch.dtype) -> None:
    gate_up, down = operands("ragged", 32, dtype)
    x, chosen, weights = inputs("ragged", 33, dtype)
    out = run_tiles(x, chosen, weights, gate_up, down, TILES[tiles])
    assert_close(out, expected(x, chosen, weights, gate_up, down))


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 129, 700])
@pytest.mark.parametrize("shape", ["qwen3-30b", "mixtral"])
def test_the_table_chooses_tiles_that_fit(shape: str, tokens: int) -> None:
    gate_up, down = operands(shape, 128)
    x, chosen, weights = inputs(shape, tokens, torch.float16)
    assert_close(moe_mlp(x, chosen, weights, gate_up, down), expected(x, chosen, weights, gate_up, down))


@pytest.mark.parametrize("tokens", [3, 300])
def test_a_graph_follows_another_choice_of_experts(tokens: int) -> None:
    gate_up, down = operands("ragged", 32)
    x, chosen, weights = inputs("ragged", tokens, torch.float16)
    moe_mlp(x, chosen, weights, gate_up, down)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_mlp(x, chosen, weights, gate_up, down)
    other, routed, factors = inputs("ragged", tokens + 1, torch.float16)
    for target, source in ((x, other), (chosen, routed), (weights, factors)):
        target.copy_(source[:tokens])
    graph.replay()
    assert_close(out, expected(x, chosen, weights, gate_up, down))
