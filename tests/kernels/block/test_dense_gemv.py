"""One token through a float weight: the kernel in the Triton interpreter against float64, compiled for Hopper, and the wrapper's checks.

The interpreter cuts float32 to bf16 where a GPU rounds to nearest: float32 results are judged strictly, bf16 ones by a whole step.
"""

from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor

from kernels.block.dense_gemv import (
    DenseTile,
    default_tile,
    dense_gemv,
    dense_gemv_reference,
    launch_dense_gemv,
    takes,
)

ROUNDING = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7,
}  # largest relative error of one rounding; bf16: of one cut

needs_interpreter = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels were imported for a GPU: tests/gpu runs them there"
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(8, 4096), (18, 520), (34, 8), (6, 1304), (1, 2056), (2, 6152)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_kernel_against_float64(
    rows: int, cols: int, dtype: torch.dtype, has_bias: bool, has_residual: bool
) -> None:
    """Whole and ragged tiles in both directions: one rounding to the dtype, float32 sums before it."""
    x, weight = normal(1, cols, dtype=dtype), (normal(rows, cols, seed=1) / cols**0.5).to(dtype)
    bias = normal(rows, seed=2, dtype=dtype) if has_bias else None
    residual = normal(1, rows, seed=3, dtype=dtype) if has_residual else None
    expected = x.double() @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()  # what the float32 sums round at
    for given in (bias, residual):
        if given is not None:
            expected = expected + given.double()
    got = launch_dense_gemv(x, weight, bias, False, dtype, pdl=False, residual=residual)
    assert got.shape == (1, rows) and got.dtype == dtype
    assert ((got.double() - expected).abs() <= ROUNDING[dtype] * expected.abs() + 1e-6 * (1 + size)).all()
    wide = launch_dense_gemv(x, weight, bias, False, torch.float32, pdl=False, residual=residual)
    assert ((wide.double() - expected).abs() <= 1e-6 * (1 + size)).all()
    if dtype is torch.float16:
        assert torch.equal(wide.to(dtype), got)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(8, 4096), (18, 520), (6, 4104), (2, 8)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gated_equals_the_reference(rows: int, cols: int, dtype: torch.dtype, has_bias: bool) -> None:
    """Same roundings, sums in another order: gate and up may differ by one step before they are multiplied."""
    x, weight = normal(1, cols, dtype=dtype), (normal(rows, cols, seed=1) / cols**0.5).to(dtype)
    bias = normal(rows, seed=2, dtype=dtype) if has_bias else None
    residual = normal(1, rows // 2, seed=3, dtype=dtype)
    for given in (None, residual):
        got = launch_dense_gemv(x, weight, bias, True, dtype, pdl=False, residual=given)
        expected = dense_gemv_reference(x, weight, bias, gated=True, residual=given)
        assert got.shape == (1, rows // 2)
        assert torch.allclose(got, expected, rtol=8 * ROUNDING[dtype], atol=8 * ROUNDING[dtype])


@needs_interpreter
@pytest.mark.parametrize(
    "tile", [DenseTile(4, 1024, 4), DenseTile(8, 512, 2), DenseTile(16, 512, 1), DenseTile(32, 256, 1)]
)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("cols", [1096, 2048])
def test_tiles_compute_the_same_product(tile: DenseTile, gated: bool, cols: int) -> None:
    """Every row and column once, whatever the tile: small whole numbers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (1, cols), generator=generator).half()
    weight = torch.randint(-2, 3, (38, cols), generator=generator).half()
    got = launch_dense_gemv(x, weight, None, gated, torch.float32, pdl=False, tile=tile)
    assert torch.equal(got, launch_dense_gemv(x, weight, None, gated, torch.float32, pdl=False))
    if not gated:
        assert torch.equal(got, x.float() @ weight.float().t())


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_and_denormal_values(dtype: torch.dtype) -> None:
    """float32 sums: products that overflow 16 bits cancel exactly, and denormals count."""
    info = torch.finfo(dtype)
    x, weight = torch.zeros(1, 1032, dtype=dtype), torch.zeros(4, 1032, dtype=dtype)
    x[0, :4] = torch.tensor([256.0, 256.0, 1.0, 1024.0])
    weight[0, :4] = torch.tensor([1024.0, -1024.0, 3.0, 0.0])  # 2^18 - 2^18 + 3
    weight[1, 2] = info.smallest_normal / 4  # a denormal, times 1
    weight[2, 3] = info.smallest_normal / 4  # times 1024: normal again
    weight[3, 1031], x[0, 1031] = 1.0, info.max
    got = launch_dense_gemv(x, weight, None, False, torch.float32, pdl=False)[0].to(dtype)
    expected = torch.tensor([3.0, info.smallest_normal / 4, info.smallest_normal * 256, info.max]).to(dtype)
    assert torch.equal(got, expected)
    if dtype is torch.float16:
        above = torch.full((1, 4), info.max, dtype=dtype)
        over = launch_dense_gemv(x, weight, None, False, dtype, pdl=False, residual=above)[0]
        assert over[3] == torch.inf and over[0] == info.max


@needs_interpreter
@pytest.mark.parametrize("cols", [2048, 1032])
def test_infinities_and_nans_reach_their_rows_alone(cols: int) -> None:
    """In the last column too, where a ragged tile is masked: rows past the end and columns past K add nothing."""
    x, weight = torch.ones(1, cols).half(), torch.ones(7, cols).half()
    weight[1, cols - 1], weight[2, 5], weight[6, 0] = torch.inf, torch.nan, -torch.inf
    got = launch_dense_gemv(x, weight, None, False, torch.float16, pdl=False)[0]
    assert got[1] == torch.inf and got[2].isnan() and got[6] == -torch.inf
    assert torch.equal(got[[0, 3, 4, 5]], torch.full((4,), float(cols)).half())
    x[0, cols - 1] = torch.inf  # times a weight of each sign
    weight[3, cols - 1] = -1.0
    got = launch_dense_gemv(x, weight, None, False, torch.float16, pdl=False)[0]
    assert got[0] == torch.inf and got[3] == -torch.inf and got[2].isnan()


def test_reference_is_the_plain_formula() -> None:
    x, weight, bias = normal(1, 24), normal(6, 24, seed=1), normal(6, seed=2)
    y = [
        sum(float(w) * float(v) for w, v in zip(row, x[0], strict=True)) + float(b)
        for row, b in zip(weight, bias, strict=True)
    ]
    assert torch.allclose(dense_gemv(x, weight, bias), torch.tensor([y]).half(), rtol=2e-3)
    gated = [g / (1 + 2.718281828**-g) * u for g, u in zip(y[:3], y[3:], strict=True)]
    assert torch.allclose(dense_gemv(x, weight, bias, gated=True), torch.tensor([gated]).half(), rtol=4e-3)
    residual = normal(1, 6, seed=3)
    total = torch.tensor([y]) + residual.float()
    assert torch.allclose(dense_gemv(x, weight, bias, residual=residual), total.half(), rtol=2e-3, atol=1e-3)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"expected \(1, K\)"):
        dense_gemv(normal(2, 8), normal(4, 8))
    with pytest.raises(ValueError, match="as many of each"):
        dense_gemv(normal(1, 8), normal(5, 8), gated=True)
    with pytest.raises(ValueError, match="bias"):
        dense_gemv(normal(1, 8), normal(4, 8), normal(4).float())
    with pytest.raises(ValueError, match="residual"):
        dense_gemv(normal(1, 8), normal(4, 8), residual=normal(1, 4), gated=True)
    with pytest.raises(ValueError, match="one dtype"):
        dense_gemv(normal(1, 8), normal(4, 8).bfloat16())
    with pytest.raises(ValueError, match="multiples of 8"):
        launch_dense_gemv(normal(1, 12), normal(4, 12), None, False, torch.float16)
    for wrong in ((3, 512, 2), (64, 512, 2), (4, 512, 4), (4, 768, 1), (1, 512, 2)):
        with pytest.raises(ValueError, match="expected a power of two"):
            DenseTile(*wrong)
    with pytest.raises(ValueError, match="dependent"):
        DenseTile(4, 512, 2, "sometimes")


def test_what_the_kernel_refuses_is_a_plain_product() -> None:
    """On the CPU, in float32 and for a K that 8 does not divide."""
    assert not takes(normal(1, 16), normal(4, 16))
    x, weight = normal(1, 12).float(), normal(4, 12, seed=1).float()
    assert torch.allclose(dense_gemv(x, weight), x @ weight.t())


@pytest.mark.parametrize("rows", [1, 576, 2048, 4096, 12288, 22016, 32000, 152064])
def test_default_tiles_keep_enough_under_way(rows: int) -> None:
    """From 1,056 rows on, the first turns of all programs ask for 32 KB a multiprocessor."""
    tile = default_tile(rows)
    assert tile.bk == 256 * tile.warps
    assert rows < 1056 or -(-rows // tile.bn) * tile.bn * tile.bk * 2 >= 132 << 15


COMPILE = """
import re, subprocess, sys, tempfile, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.block.dense_gemv import DenseTile, dense_gemv_kernel, default_tile

tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

def build(tile, half, gated, even, has_bias, has_residual, out=None):
    names = dense_gemv_kernel.arg_names
    given = dict(
        GATED=gated, HAS_BIAS=has_bias, HAS_RESIDUAL=has_residual, EVEN_K=even, BF16=half == "bf16", BN=tile.bn // 2 if gated else tile.bn,
        BW=tile.bk // 2, ASKS=tile.ask_mib > 0, ASM=True, DEPENDENT=tile.dependent,
    )
    given |= {name: None for name, there in (("bias", has_bias), ("residual", has_residual)) if not there}
    kinds = {"x": "*i32", "weight": "*i32", "bias": "*" + half, "residual": "*" + half, "out": "*" + (out or half)}
    signature = {n: "constexpr" if n in given else kinds.get(n, "i32") for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in kinds if n not in given}
    source = ASTSource(dense_gemv_kernel, signature, {(names.index(n),): v for n, v in given.items()}, aligned)
    options = {"num_warps": tile.warps, "enable_fp_fusion": True, "launch_pdl": tile.dependent != "never"}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    loop = built.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    assert "convert_layout" not in loop, "x does not lie as the weights do"
    ptx = built.asm["ptx"]
    assert ("cp.async.bulk.prefetch.L2" in ptx) == (tile.ask_mib > 0)
    weights = re.findall(r"ld\\.global\\.L1::evict_first\\S*", ptx)
    assert weights and all(".v4." in load for load in weights), weights
    if tool.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"]); file.flush()
            usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, stack, local = (int(re.search(name + r":(\\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        assert stack == local == 0 and registers * 32 * tile.warps * 3 <= 65536, usage

assert default_tile(4096) == DenseTile(8, 1024, 4)
build(default_tile(4096), "fp16", False, True, False, False)
build(default_tile(4096), "bf16", False, False, True, True)
build(default_tile(32000), "fp16", False, True, False, False, out="fp32")
build(default_tile(22016), "fp16", True, True, False, False)
build(DenseTile(2, 2048, 8, "early", 16), "bf16", True, False, True, False)
build(DenseTile(8, 512, 2, "late", 16), "fp16", False, False, False, True)
build(DenseTile(4, 1024, 4, "never", 0), "fp16", False, True, False, False)
build(DenseTile(4, 2048, 8, "waited", 32), "fp16", False, True, False, False)
print("compiled")
"""


def test_compiles_for_hopper_without_spills(build_for_hopper: Callable[..., str]) -> None:
    """16-byte loads of weights, x where the weights are, and three programs or more on a multiprocessor."""
    build_for_hopper(COMPILE)
