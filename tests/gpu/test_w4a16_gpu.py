"""W4A16 kernels on the GPU: error against float32 products, the same bits each time, dependent launches in a chain."""

import dataclasses

import pytest
import torch
from torch import Tensor

from kernels.int4 import Quantized
from kernels.w4a16.gemv import GemvTile
from kernels.w4a16.layout import W4Weight, pair, prepare, restore
from kernels.w4a16.prefill import PrefillTile
from kernels.w4a16.product import Tile, has_wgmma, run_tile, table_of, w4a16_linear, w4a16_reference
from kernels.w4a16.schedule import GemmTile, WgmmaTile
from kernels.w4a16.split import SplitTile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Inputs are drawn from torch's generators: a failure comes back."""
    torch.manual_seed(0)


def make(rows: int, cols: int, group_size: int, seed: int = 0) -> Quantized:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    groups = cols // group_size
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, device="cuda", generator=generator)
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, device="cuda", generator=generator)
    scales = (torch.rand(rows, groups, device="cuda", generator=generator) * 0.004 + 0.001).half()
    zeros[0], zeros[1], codes[0, ::2], codes[1, ::2] = 0, 15, 15, 0
    scales[2] = 2.0**-24
    return Quantized(codes, scales, zeros, group_size)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("rows", "cols"), [(4096, 4096), (1000, 11008), (192, 576), (4104, 14336)])
def test_dispatched_products(rows: int, cols: int, group_size: int, dtype: torch.dtype) -> None:
    group_size = min(group_size, cols & -cols)  # 576 takes groups of 32 and 64
    quantized = make(rows, cols, group_size)
    weight = prepare(quantized)
    dense = quantized.dequantize()
    for tokens in (1, 2, 7, 16, 17, 33, 64, 100, 128, 200, 300, 1025):
        x = torch.randn(tokens, cols, device="cuda").to(dtype)
        expected = x.double() @ dense.double().t()
        out = w4a16_linear(x, weight)
        assert relative_error(out, expected) < TOLERANCE[dtype], tokens
        again = w4a16_linear(x, weight, is_dependent=True)
        assert torch.equal(out, again), tokens


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 40, 300])
@pytest.mark.parametrize("is_paired", [False, True])
def test_epilogue(tokens: int, is_paired: bool, dtype: torch.dtype) -> None:
    bias = torch.randn(520, device="cuda")
    first = prepare(make(520, 1024, 128, 1), bias)
    weight = pair(first, prepare(make(520, 1024, 128, 2))) if is_paired else first
    x = torch.randn(tokens, 1024, device="cuda").to(dtype)
    residual = torch.randn(tokens, 520, device="cuda").to(dtype)
    expected = w4a16_reference(x.float(), weight, residual.float())
    bound = TOLERANCE[dtype] * (4 if tokens == 300 else 1)  # the prefill regime rounds before its epilogue
    assert relative_error(w4a16_linear(x, weight, residual), expected) < bound


@pytest.mark.parametrize(
    "tile",
    [
        GemvTile(16, 8, 4),
        GemvTile(8, 8, 4, scales_ahead=True),
        GemmTile(16, 64, 4, 4, False, True, 3),
        GemmTile(16, 128, 4, 4, False, False, 2),
        GemmTile(8, 64, 4, 5, True, True, 2),
        GemmTile(64, 128, 4, 4, True, True, 2),
        GemmTile(16, 64, 4, 4, False, True, 4, dependent="late"),
        GemvTile(8, 8, 4, dependent="late"),
        GemvTile(8, 8, 4, dependent="waited"),
        GemvTile(8, 8, 4, dependent="waited", ahead=32),
        GemvTile(4, 8, 2, ahead=16),
        GemmTile(8, 128, 4, 4, True, True, 2, dependent="waited"),
        SplitTile(128, 4, 4, 4),
        SplitTile(64, 8, 2, 4, dependent="early"),
        SplitTile(128, 1, 4, 4, dependent="late"),
        PrefillTile(512),
    ],
)
def test_every_kernel_gives_the_same_bits_each_time(tile: Tile) -> None:
    weight = prepare(make(1536, 8192, 128))
    x = torch.randn(1 if isinstance(tile, GemvTile) else 8, 8192, device="cuda").half()
    out = torch.empty(x.shape[0], 1536, dtype=torch.float16, device="cuda")
    results = []
    for _ in range(20):
        out.fill_(float("nan"))
        run_tile(tile, x, weight, out, is_dependent=True)  # where the tile has a way of its own
        results.append(out.clone())
    assert all(torch.equal(results[0], result) for result in results)
    assert relative_error(out, w4a16_reference(x.float(), weight)) < 1e-3


@pytest.mark.parametrize("tokens", [1, 4, 16, 48])
def test_a_chain_of_dependent_launches_in_a_graph(tokens: int) -> None:
    """Each product reads what the one before has written: a wait that came too late would show."""
    weights = [prepare(make(2048, 2048, 128, seed)) for seed in range(8)]
    x = torch.randn(tokens, 2048, device="cuda").half()

    def chain(is_dependent: bool) -> Tensor:
        y = x
        for weight in weights:
            y = w4a16_linear(y, weight, is_dependent=is_dependent)
            y = y / 4 if not is_dependent else y.mul_(0.25)
        return y

    expected = chain(False)
    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(True)
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


def test_dependent_products_directly_behind_each_other() -> None:
    weights = [prepare(make(4096, 4096, 128, seed)) for seed in range(6)]
    for weight in weights:
        weight.params.copy_(weight.params & -65536 | 0x1000)  # scale 4.9e-4: the chain stays in range
    for tokens in (1, 3, 16, 64):
        x = torch.randn(tokens, 4096, device="cuda").half()
        plain = dependent = x
        for weight in weights:
            plain = w4a16_linear(plain, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in weights:
                dependent = w4a16_linear(dependent, weight, is_dependent=True)
        for _ in range(20):
            graph.replay()
            assert torch.equal(plain, dependent), tokens


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("rows", "cols"), [(4096, 4096), (1000, 11008), (192, 576)])
def test_split_products(rows: int, cols: int, group_size: int, dtype: torch.dtype) -> None:
    """Shapes that fit the tiles and shapes that do not, plain and dependent, whatever the table of this card chooses."""
    quantized = make(rows, cols, min(group_size, cols & -cols))
    weight = prepare(quantized)
    dense = quantized.dequantize().double()
    for tokens in (1, 3, 8, 9, 16, 31):
        x = torch.randn(tokens, cols, device="cuda").to(dtype)
        tiles: list[Tile] = [SplitTile(128, 4, 4, 4), SplitTile(64, 1, 2, 4)]
        for tile in tiles:
            for is_dependent in (False, True):
                out = torch.full((tokens, rows), float("nan"), dtype=dtype, device="cuda")
                run_tile(tile, x, weight, out, is_dependent=is_dependent)
                assert relative_error(out, x.double() @ dense.t()) < TOLERANCE[dtype], (tokens, tile)


WGMMA_TILES = [
    WgmmaTile(128, 256, 2, 4, 0),
    WgmmaTile(128, 256, 2, 4, 1, pending=2),
    WgmmaTile(64, 256, 2, 5, 1, dependent="waited"),
    WgmmaTile(64, 128, 1, 3, 2, dependent="early"),
    WgmmaTile(64, 256, 4, 5, 1),
    WgmmaTile(256, 128, 2, 3, 0.25),
]


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0) or not has_wgmma(torch.cuda.current_device()):
        pytest.skip("no device of compute capability 9.0, or a Triton without a Gluon that compiles w4_wgmma")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("tile", WGMMA_TILES)
@pytest.mark.usefixtures("hopper")
def test_wgmma_products(tile: WgmmaTile, group_size: int, dtype: torch.dtype) -> None:
    """Shapes that fit the tiles and shapes that do not; x with rows at odd places; the same bits each time."""
    for rows, cols in ((2048, 4096), (1000, 1088), (64, 128), (4104, 2048)):
        quantized = make(rows, cols, min(group_size, cols & -cols))
        weight = prepare(quantized)
        dense = quantized.dequantize().double()
        for tokens in (1, 64, 135, 300):
            x = torch.randn(tokens, cols, device="cuda").to(dtype)
            outs = []
            for operand in (x, x, torch.cat([x[:, :3], x], dim=1)[:, 3:]):
                outs.append(torch.full((tokens, rows), float("nan"), dtype=dtype, device="cuda"))
                run_tile(tile, operand, weight, outs[-1], is_dependent=True)
            assert relative_error(outs[0], x.double() @ dense.t()) < TOLERANCE[dtype], (rows, cols, tokens)
            assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2]), (rows, cols, tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_paired", [False, True])
@pytest.mark.parametrize("tile", WGMMA_TILES)
@pytest.mark.usefixtures("hopper")
def test_wgmma_epilogue(tile: WgmmaTile, is_paired: bool, dtype: torch.dtype) -> None:
    bias = torch.randn(520, device="cuda")
    first = prepare(make(520, 1024, 128, 1), bias)
    weight = pair(first, prepare(make(520, 1024, 128, 2))) if is_paired else first
    for tokens in (3, 70, 260):
        x = torch.randn(tokens, 1024, device="cuda").to(dtype)
        residual = torch.randn(tokens, 520, device="cuda").to(dtype)
        out = torch.full_like(residual, float("nan"))
        run_tile(tile, x, weight, out, residual)
        assert relative_error(out, w4a16_reference(x.float(), weight, residual.float())) < TOLERANCE[dtype], (
            tokens
        )


@pytest.mark.usefixtures("hopper")
def test_wgmma_gives_the_same_bits_in_a_graph_and_beside_other_work() -> None:
    weight = prepare(make(1536, 8192, 128))
    x = torch.randn(200, 8192, device="cuda").half()
    for tile in WGMMA_TILES:
        out = torch.empty(200, 1536, dtype=torch.float16, device="cuda")
        run_tile(tile, x, weight, out)
        expected = out.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                run_tile(tile, x, weight, out, is_dependent=True)
        for _ in range(10):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, expected), tile


@pytest.mark.usefixtures("hopper")
def test_wgmma_refuses_what_bulk_copies_cannot_take() -> None:
    weight = prepare(make(62, 128, 128))
    x, out = torch.ones(8, 128, device="cuda").half(), torch.empty(8, 62, device="cuda").half()
    with pytest.raises(ValueError, match="multiples of 8 and 4"):
        run_tile(WGMMA_TILES[0], x, weight, out)


def test_chains_of_each_way_of_starting_the_kernel_behind() -> None:
    weights = [prepare(make(2048, 2048, 128, seed)) for seed in range(6)]
    for weight in weights:
        weight.params.copy_(weight.params & -65536 | 0x1000)  # scale 4.9e-4: the chain stays in range
    chains: list[tuple[Tile, int]] = [(GemvTile(8, 8, 4), 1), (SplitTile(128, 8, 4, 4), 6)]
    chains += [(GemmTile(8, 128, 4, 4, True, True, 1), 6)]
    if torch.cuda.get_device_capability() == (9, 0) and has_wgmma(torch.cuda.current_device()):
        chains += [(WgmmaTile(64, 256, 2, 5, 1), 64), (WgmmaTile(128, 128, 2, 5, 0), 200)]
    for tile, tokens in chains:
        x = torch.randn(tokens, 2048, device="cuda").half()
        buffers = [torch.empty_like(x) for _ in weights]
        run_chain(tile, weights, x, buffers, False)
        expected = buffers[-1].clone()
        for mode in ("early", "waited", "late"):
            variant = dataclasses.replace(tile, dependent=mode)
            run_chain(variant, weights, x, buffers, True)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run_chain(variant, weights, x, buffers, True)
            for _ in range(20):
                for buffer in buffers:
                    buffer.fill_(float("nan"))
                graph.replay()
                assert torch.equal(buffers[-1], expected), (tile, mode)


def run_chain(
    tile: Tile, weights: list[W4Weight], x: Tensor, buffers: list[Tensor], is_dependent: bool
) -> None:
    for weight, buffer in zip(weights, buffers, strict=True):
        run_tile(tile, x, weight, buffer, is_dependent=is_dependent)
        x = buffer


def test_prepare_and_restore_on_the_gpu() -> None:
    quantized = make(640, 1152, 64)
    back = restore(prepare(quantized))
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales) and torch.equal(back.zeros, quantized.zeros)


def test_the_table_of_this_card_is_read() -> None:
    assert table_of(torch.device("cuda"))
