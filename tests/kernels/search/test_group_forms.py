"""Quadratic forms of groups against their definition in float64; the GPU kernel in Triton's interpreter and its build for sm_90."""

import pytest
import torch

from kernels.search import group_forms as module
from kernels.search.group_forms import group_forms

BUILD = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.search import clip, group_forms, sweeps

def build(kernel, warps, stages=3, **constants):
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in constants else "*fp32" if n.endswith("_ptr") else "i32" for n in names}
    kinds |= {n: kind for n, kind in (("index_ptr", "*i32"), ("scale_min", "fp32"), ("scale_max", "fp32")) if n in names}
    source = ASTSource(kernel, kinds, {(names.index(n),): v for n, v in constants.items()}, {})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    assert built.asm["cubin"] and built.metadata.shared < 227 * 1024, kernel

for size in (32, 64, 128):
    build(group_forms._group_forms_kernel, 8 if size == 128 else 4, group_forms.stages(size), GROUP=size, ROWS=group_forms._ROWS)
    build(clip._choose_ranges_kernel, clip.warps(size), GROUP=size, ROWS=clip._ROWS, SYMMETRIC=size == 64)
build(sweeps._gptq_block, 1, BLOCK=64, ROWS=32)
build(sweeps._descent_block, 1, BLOCK=64, ROWS=32)
print("compiled")
"""


def problem(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(2 * cols, cols, generator=generator)
    return torch.randint(-8, 8, (rows, cols), generator=generator).float(), x.t() @ x / len(x)


def defined(codes: torch.Tensor, gram: torch.Tensor, size: int) -> torch.Tensor:
    groups = codes.shape[1] // size
    u, blocks = codes.double().view(-1, groups, size), gram.double().view(groups, size, groups, size)
    return torch.einsum("nia,iajb,njb->nij", u, blocks, u)


def test_the_forms_are_those_of_the_definition() -> None:
    codes, gram = problem(20, 192)
    torch.testing.assert_close(
        group_forms(codes, gram, 64).double(), defined(codes, gram, 64), rtol=1e-5, atol=1e-2
    )


@pytest.mark.parametrize(("rows", "size"), [(70, 32), (64, 64), (5, 128)])
def test_the_kernel_gives_the_same_on_rows_that_do_not_fill_a_tile(rows: int, size: int) -> None:
    pytest.importorskip("triton")
    codes, gram = problem(rows, 2 * size + 128)
    groups = codes.shape[1] // size
    out = torch.full((rows, groups, groups), torch.nan)
    grid = (-(-rows // module._ROWS), groups)
    module._group_forms_kernel[grid](
        codes, gram, out, rows, codes.shape[1], groups, GROUP=size, ROWS=module._ROWS
    )
    # TF32 has a 10-bit significand: 5e-4 of each product, codes are exact in it
    wanted = defined(codes, gram, size)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert torch.equal(out, out.transpose(1, 2))


def test_shapes_that_do_not_fit_are_refused() -> None:
    codes, gram = problem(4, 128)
    with pytest.raises(ValueError, match="whole groups"):
        group_forms(codes, gram[:64, :64], 64)
    with pytest.raises(ValueError, match="whole groups"):
        group_forms(codes, gram, 96)


def test_the_kernels_of_the_search_compile_for_hopper(build_for_hopper) -> None:
    pytest.importorskip("triton")
    build_for_hopper(BUILD)
