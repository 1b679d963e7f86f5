"""Each kernel of the attention path, and the W4A16 kernels for few tokens, compile for sm_90 without a GPU: the interpreter does not see what the compiler refuses."""

import pytest

SCRIPT = """
import itertools, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.attention import decode as attention_decode
from kernels.attention import merge as attention_merge
from kernels.block import fused_triton
from kernels.kv import int8_triton as kv8_triton
from kernels.w4a16 import gemm as w4a16_gemm
from kernels.w4a16 import gemv as w4a16_gemv
from kernels.w4a16 import prefill as w4a16_prefill
from kernels.w4a16 import split as w4a16_split

FLOATS = {"cos_ptr", "sin_ptr", "q_scale_ptr", "static_ptr", "partial_ptr", "lse_ptr"}
INTS = {"params_ptr", "tables_ptr", "table_ptr", "lens_ptr", "arrivals_ptr"}

def kind(name, mode):
    if name in FLOATS: return "*fp32"
    if name in INTS: return "*i32"
    if name == "slots_ptr": return "*i64"
    if "pages" in name or (name in ("k_ptr", "v_ptr") and mode is not None): return "*fp16" if mode == 0 else "*i16"
    if name.endswith("_ptr"): return "*fp16"
    return "fp32" if name in ("eps", "score_scale") else "i32"

def build(kernel, mode=None, pages=None, warps=4, stages=2, **constants):
    names = kernel.arg_names
    if mode is not None: constants["MODE"] = mode
    signature = {n: "constexpr" if n in constants else kind(n, pages) for n in names}
    for n in names:
        if mode is not None and "pages" in n: signature[n] = "*fp16" if mode == 0 else "*i16"
    options = {"num_warps": warps, "num_stages": stages}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, {})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.asm["cubin"], kernel
    assert built.metadata.shared < 227 * 1024, (kernel, built.metadata.shared)

for mode in (0, 1, 2):
    build(attention_decode.decode_kernel, mode, mode, ROWS=4, ROW_PAD=16, HEAD_DIM=64, PAGE=64, WINDOW=100 * (mode == 2),
          ROPE=True, NORM=True, SCALE=mode == 1, FUSED_MERGE=True, ASM=True, PDL=True, TILE=32, EVEN=mode > 0,
          BATCH_PAD=16 if mode else 1, MERGE_ROWS=4, MERGE_STEP=8)
    build(fused_triton.rope_store_kernel, mode, NORM=True, SCALE=True, HEADS=2, HALF=32, PAGE=64, PDL=True, warps=1)
    build(kv8_triton.store_kernel, mode, HEADS=2, HALF=32, PAGE=64, warps=1)
    build(kv8_triton.gather_kernel, mode, HALF=32, PAGE=64)
build(attention_merge.merge_kernel, HEAD_DIM=64, WINDOW=0, ASM=True, TILE=32, EVEN=True, BATCH_PAD=16, STEP=8)
build(fused_triton.rms_norm_kernel, ADD=True, BLOCK=1024, PDL=True)
build(fused_triton.silu_mul_kernel, BLOCK=512, PDL=True)
source = ASTSource(w4a16_prefill.silu_pairs, {"pairs": "*fp16", "out": "*fp16", "size": "i32", "BLOCK": "constexpr"}, {(3,): 1024}, {})
assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]

def product(kernel, half, warps, stages, words="*i16", **constants):
    kinds = {"x": half if words == "*i16" else "*i32", "words": words, "scale_zero": "*i32", "out": half, "partial": "*fp32", "arrived": "*i32"}
    given = dict(bias=None, residual=None, EVEN_N=True, EVEN_K=True, HAS_BIAS=False, HAS_RESIDUAL=False, PAIRED=False, ASM=True) | constants
    names = kernel.arg_names
    signature = {n: "constexpr" if n in given else kinds.get(n, "i32") for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in (*kinds, "N", "K") if n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in given.items()}, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    assert built.metadata.shared < 227 * 1024, (kernel, built.metadata.shared)

for half, group, mode in (("*fp16", 128, "waited"), ("*bf16", 64, "late")):
    product(w4a16_split.w4_split, half, 4, 4, GROUP=group, EIGHTS=2, BN=128, SPLIT=3, AHEAD=8, DEPENDENT=mode)
    product(w4a16_gemm.w4_matmul, half, 8, 4, GROUP=group, BM=64, BN=128, SWAP=True, SCALE_FIRST=True, SEGMENTS=2, DEPENDENT=mode)
    product(w4a16_gemv.w4_gemv, half, 2, 3, words="*i32", GROUP=group, BF16=half == "*bf16", BN=4, BLOCKS=8, SCALES_AHEAD=False,
            AHEAD=32, DEPENDENT=mode)
print("compiled")
"""


def test_kernels_compile_for_hopper(build_for_hopper):
    pytest.importorskip("triton")
    build_for_hopper(SCRIPT)
