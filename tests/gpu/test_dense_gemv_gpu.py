"""One token through a float weight on a GPU: every shape of the 7B and 70B models and the head, each way of starting, chains, and repeatability."""

import pytest
import torch
from torch import Tensor

from kernels.block.dense_gemv import DenseTile, default_tile, dense_gemv, launch_dense_gemv, takes
from kernels.block.fused import add_rms_norm
from kernels.w4a16.unpack import DEPENDENT_MODES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [  # (N, K) of 7B, the head, 70B, and ragged ones
    (12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096), (128256, 4096),
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672), (1002, 520), (34, 8), (2, 64), (130, 1304), (576, 576),
]  # fmt: skip
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # one rounding: 2^-11 and 2^-8 at most


def operands(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x (1, K), weight (N, K) and bias (N,)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x, weight, bias = (
        torch.randn(shape, generator=generator, device="cuda") for shape in ((1, cols), (rows, cols), (rows,))
    )
    return x.to(dtype), (weight / cols**0.5).to(dtype), bias.to(dtype)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """In float64, in pieces: the head in float64 would be 8 GB."""
    return torch.cat([x.double() @ part.double().t() for part in weight.split(8192)], 1)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_product(rows: int, cols: int, dtype: torch.dtype) -> None:
    """Plain, with bias and residual, gated, and as float32; the same bits twice."""
    x, weight, bias = operands(rows, cols, dtype)
    assert takes(x, weight)
    plain = product(x, weight)
    assert error(dense_gemv(x, weight), plain) < TOLERANCE[dtype]
    assert error(dense_gemv(x, weight, out_dtype=torch.float32), plain) < 3e-6
    residual = operands(1, rows, dtype, 1)[0]
    got = dense_gemv(x, weight, bias, residual=residual)
    assert error(got, plain + bias.double() + residual.double()) < TOLERANCE[dtype]
    assert torch.equal(got, dense_gemv(x, weight, bias, residual=residual))
    gate, up = (plain + bias.double()).chunk(2, -1)
    gated = dense_gemv(x, weight, bias, gated=True)
    # gate, silu(gate) and up are rounded too
    assert error(gated, torch.nn.functional.silu(gate) * up) < 3 * TOLERANCE[dtype]
    assert torch.equal(gated, dense_gemv(x, weight, bias, gated=True))


@pytest.mark.parametrize("mode", DEPENDENT_MODES)
@pytest.mark.parametrize("ask_mib", [0, 16])
@pytest.mark.parametrize("size", [(4, 1024, 4), (2, 2048, 8), (8, 512, 2), (8, 1024, 4), (4, 2048, 8)])
def test_every_way_of_starting(size: tuple[int, int, int], ask_mib: int, mode: str) -> None:
    """A tile gives the same bits however it starts and whatever it asks for."""
    tile = DenseTile(*size, mode, ask_mib)
    for rows, cols, gated in ((4096, 4096, False), (1002, 520, True), (4096, 11008, False)):
        x, weight, bias = operands(rows, cols, torch.float16)
        alone = launch_dense_gemv(x, weight, bias, gated, torch.float16, pdl=False, tile=tile)
        if not gated:
            assert error(alone, product(x, weight) + bias.double()) < TOLERANCE[torch.float16]
        for _ in range(3):
            assert torch.equal(launch_dense_gemv(x, weight, bias, gated, torch.float16, tile=tile), alone)


@pytest.mark.parametrize("mode", DEPENDENT_MODES)
@pytest.mark.parametrize("ask_mib", [0, 16])
def test_chain_of_dependent_kernels_in_a_graph(mode: str, ask_mib: int) -> None:
    """Products and norms, each reading what the one ahead wrote: as one launch after another, and as a captured graph, the same bits."""
    tile = DenseTile(4, 1024, 4, mode, ask_mib)
    weights = [operands(4096, 4096, torch.float16, seed)[1] for seed in range(4)]
    norm = torch.ones(4096, device="cuda").half()

    def chain(x: Tensor, pdl: bool, is_waiting: bool) -> Tensor:
        stream = torch.zeros_like(x)
        for _ in range(4):
            for weight in weights:
                x = launch_dense_gemv(x, weight, None, False, torch.float16, pdl, tile=tile)
                if is_waiting:
                    torch.cuda.synchronize()
                stream, x = add_rms_norm(stream, x, norm, 1e-6, pdl=pdl)
                if is_waiting:
                    torch.cuda.synchronize()
        return stream

    x = operands(1, 4096, torch.float16, 9)[0]
    expected = chain(x, False, True)
    assert torch.equal(chain(x, True, False), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x, True, False)
    for _ in range(5):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


def test_infinities_and_nans_reach_their_rows_alone() -> None:
    x, weight, _ = operands(4096, 4096, torch.float16)
    weight[7, 4095], weight[4095, 0] = torch.inf, torch.nan
    torch.cuda.synchronize()  # weights are read before the kernel ahead has ended
    got = dense_gemv(x, weight)[0]
    assert got[7].isinf() and got[4095].isnan() and int(got.isfinite().sum()) == 4094


@pytest.mark.parametrize("cols", [4098, 4096])
def test_what_the_kernel_refuses_goes_through_cublas(cols: int) -> None:
    """K that 8 does not divide, and a weight that does not start at a multiple of 16 bytes."""
    storage = torch.randn(64 * cols + 1, device="cuda").half()
    weight = storage[1:].view(64, cols) if cols == 4096 else storage[:-1].view(64, cols)
    x = torch.randn(1, cols, device="cuda").half()
    assert not takes(x, weight)
    assert torch.equal(dense_gemv(x, weight), torch.nn.functional.linear(x, weight))
    gate, up = product(x, weight).chunk(2, -1)
    assert error(dense_gemv(x, weight, gated=True), torch.nn.functional.silu(gate) * up) < 2e-3


def test_default_tile_is_the_one_that_runs() -> None:
    x, weight, _ = operands(4096, 4096, torch.float16)
    given = launch_dense_gemv(x, weight, None, False, torch.float16, tile=default_tile(4096))
    assert torch.equal(dense_gemv(x, weight), given)
