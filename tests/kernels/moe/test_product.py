"""Products of experts: kernels in the Triton interpreter against a loop in float64, sorting by hand, checks of operands.

T tokens, k experts of a token, E experts, H hidden, I intermediate. Tolerances as in the tests of W4A16 products: the interpreter cuts
float32 to bf16 where a GPU rounds, and the inner values are rounded once more between the two products.
"""

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels.int4 import Quantized
from kernels.moe.few import MAX_PAIRS, FewTile
from kernels.moe.many import ManyTile
from kernels.moe.product import (
    DEFAULTS,
    Entry,
    Size,
    moe_mlp,
    moe_reference,
    parse_entries,
    pick,
    run_tiles,
    table_for,
)
from kernels.moe.sorting import most_blocks, sort_pairs
from kernels.moe.weights import ExpertWeights, stack, stack_floats
from kernels.w4a16.layout import pair, prepare, restore

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 3e-2}  # bf16: up to 7 truncations toward zero of 2^-8 each
needs_interpreter = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels were imported for a GPU: tests/gpu runs them there"
)
FEW, FEW2 = FewTile(32, 1, 1), FewTile(64, 2, 1, 2)
MANY = ManyTile(16, 64, 4, 1)
TILES = {
    "few": Entry(0, FEW, FEW),
    "few-16": Entry(0, FEW2, FEW2),
    "many": Entry(0, MANY, MANY),
    "mixed": Entry(0, FEW, MANY),
}


def quantized(rows: int, cols: int, group_size: int, generator: torch.Generator) -> Quantized:
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 16, (rows, cols // group_size), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(rows, cols // group_size, generator=generator) * 0.02 + 0.002).half()
    return Quantized(codes, scales, zeros, group_size)


def experts(
    count: int, hidden: int, inner: int, group_size: int
) -> tuple[ExpertWeights, ExpertWeights, list[tuple[Tensor, Tensor, Tensor]]]:
    """Kernel operands, and (gate, up, down) of each expert in float64."""
    generator = torch.Generator().manual_seed(7)
    sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
    parts = [[quantized(*size, group_size, generator) for size in sizes] for _ in range(count)]
    gate_up = stack([pair(prepare(gate), prepare(up)) for gate, up, _ in parts])
    down = stack([prepare(part[2]) for part in parts])
    return gate_up, down, [tuple(p.dequantize().double() for p in part) for part in parts]  # type: ignore[misc]


def routed(tokens: int, count: int, topk: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """chosen (T, k) without repetition in a row, the last expert never; weights (T, k)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, count - 1, generator=generator).argsort(dim=1)[:, :topk]
    return chosen, torch.rand(tokens, topk, generator=generator) + 0.1


def loop(x: Tensor, chosen: Tensor, weights: Tensor, floats: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    out = torch.zeros(x.shape[0], floats[0][2].shape[0], dtype=torch.float64)
    for t in range(x.shape[0]):
        for j in range(chosen.shape[1]):
            gate, up, down = floats[int(chosen[t, j])]
            row = x[t].double()
            out[t] += weights[t, j].double() * (down @ (F.silu(gate @ row) * (up @ row)))
    return out


def assert_close(out: Tensor, expected: Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert torch.isfinite(out.float()).all()
    assert error < TOLERANCE[out.dtype], error


@needs_interpreter
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(
    ("tokens", "count", "topk", "hidden", "inner", "group_size"),
    [(1, 5, 2, 128, 64, 64), (3, 9, 4, 256, 96, 32), (23, 4, 3, 192, 128, 64), (40, 3, 1, 128, 128, 128)],
)
def test_kernels_equal_a_loop(
    tiles: str,
    dtype: torch.dtype,
    tokens: int,
    count: int,
    topk: int,
    hidden: int,
    inner: int,
    group_size: int,
) -> None:
    gate_up, down, floats = experts(count, hidden, inner, group_size)
    chosen, weights = routed(tokens, count, topk)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = loop(x, chosen, weights, floats)
    assert_close(run_tiles(x, chosen, weights, gate_up, down, TILES[tiles]), expected)
    assert_close(moe_reference(x, chosen, weights, gate_up, down), expected)


@needs_interpreter
@pytest.mark.parametrize("tiles", ["few", "many"])
def test_float_experts_equal_a_loop(tiles: str) -> None:
    _, _, floats = experts(5, 96, 160, 32)
    gate, up, down = ([f[i].half() for f in floats] for i in range(3))
    chosen, weights = routed(9, 5, 2)
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(1)).half()
    operands = (stack_floats(gate, up), stack_floats(down))
    expected = loop(
        x, chosen, weights, [tuple(p.double() for p in part) for part in zip(gate, up, down, strict=True)]
    )  # type: ignore[misc]
    assert_close(run_tiles(x, chosen, weights, *operands, TILES[tiles]), expected)
    assert_close(moe_mlp(x, chosen, weights, *operands), expected)


@needs_interpreter
@pytest.mark.parametrize("tiles", ["few", "many"])
def test_all_tokens_at_one_expert(tiles: str) -> None:
    gate_up, down, floats = experts(6, 128, 64, 64)
    chosen = torch.full((37, 1), 4)
    weights = torch.ones(37, 1)
    x = torch.randn(37, 128, generator=torch.Generator().manual_seed(2)).half()
    assert_close(run_tiles(x, chosen, weights, gate_up, down, TILES[tiles]), loop(x, chosen, weights, floats))


def test_pairs_are_sorted_into_blocks_of_one_expert() -> None:
    chosen = torch.tensor(
        [[2, 0], [2, 3], [2, 0], [0, 2]]
    )  # pairs 0 .. 7; expert 0: 1, 5, 6; expert 2: 0, 2, 4, 7; 3: 3
    found = sort_pairs(chosen, 5, 2)
    assert found.order.tolist() == [1, 5, 6, 0, 2, 4, 7, 3]
    assert found.end.tolist() == [3, 3, 7, 8, 8]
    used = found.expert >= 0
    assert found.expert[used].tolist() == [0, 0, 2, 2, 3]
    assert found.first[used].tolist() == [0, 2, 3, 5, 7]
    assert found.blocks == most_blocks(8, 5, 2) == 8


def test_the_worst_routing_fits_the_number_of_blocks() -> None:
    for pairs, count, bm in ((8, 5, 2), (7, 3, 4), (64, 8, 16), (1, 8, 16)):
        for seed in range(20):
            chosen = torch.randint(0, count, (pairs, 1), generator=torch.Generator().manual_seed(seed))
            needed = sum(-(-int(n) // bm) for n in chosen.flatten().bincount(minlength=count))
            assert needed <= most_blocks(pairs, count, bm)
            assert int((sort_pairs(chosen, count, bm).expert >= 0).sum()) == needed


def test_experts_keep_their_weights_when_stacked() -> None:
    gate_up, down, floats = experts(3, 128, 64, 64)
    one = down.of_expert(2)
    assert torch.equal(restore(one).dequantize().double(), floats[2][2])  # type: ignore[arg-type]
    assert (gate_up.rows, gate_up.out_features, gate_up.experts) == (128, 64, 3)


def test_operands_that_do_not_fit_are_refused() -> None:
    gate_up, down, _ = experts(3, 128, 64, 64)
    chosen, weights = routed(2, 3, 2)
    x = torch.randn(2, 128)
    with pytest.raises(ValueError, match=r"x is \(2, 64\)"):
        moe_mlp(x[:, :64], chosen, weights, gate_up, down)
    with pytest.raises(ValueError, match="chosen is"):
        moe_mlp(x, chosen[:1], weights, gate_up, down)
    with pytest.raises(ValueError, match=r"expected integers and torch\.float32"):
        moe_mlp(x, chosen, weights.half(), gate_up, down)
    with pytest.raises(ValueError, match="paired rows"):
        moe_mlp(x[:, :64], chosen, weights, down, down)
    with pytest.raises(ValueError, match="expert 1 has"):
        stack([prepare(quantized(64, 128, g, torch.Generator())) for g in (64, 32)])
    with pytest.raises(ValueError, match="a power of two"):
        FewTile(16, 4, 1)


def test_the_table_names_tiles_by_layer_and_pairs() -> None:
    few = {"kernel": "few", "bn": 64, "warps": 2, "stages": 3, "eighths": 2}
    many = {"kernel": "many", "bm": 16, "bn": 64, "warps": 4, "stages": 2}
    sizes = ((128, 2048, 768), (8, 4096, 14336))
    rows = [
        {
            "experts": e,
            "hidden": h,
            "inner": i,
            "pairs": pairs,
            "gate_up": few,
            "down": many if e == 8 else few,
        }
        for e, h, i in sizes
        for pairs in (8, 100)
    ]
    table = parse_entries(rows)
    small, large = Size(*sizes[0]), Size(*sizes[1])
    assert pick(table, 8, small) == table[0] and pick(table, 9, small) == table[1]
    assert pick(table, 9, large) == table[3] and table[3].down == ManyTile(16, 64, 4, 2)
    assert pick(table, 9, Size(60, 2048, 1408)) == table[1]
    assert pick(table, 1025, small) == DEFAULTS[-1]  # the kernel for few tokens takes no more pairs


def test_tables_on_record_choose_a_kernel_that_takes_the_pairs() -> None:
    for name in ("NVIDIA H200", "a GPU without a table"):
        table = table_for(name)
        for size in (Size(128, 2048, 768), Size(8, 4096, 14336), Size(64, 2048, 1408)):
            for pairs in (1, 8, 1000, 1024, 1025, 5000, 1 << 20):
                entry = pick(table, pairs, size)
                few = isinstance(entry.gate_up, FewTile) or isinstance(entry.down, FewTile)
                assert not few or pairs <= MAX_PAIRS
