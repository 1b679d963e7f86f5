"""The kernels of experts compile for sm_90 without a GPU, with loads that run ahead of the products."""

import ast
from pathlib import Path

import kernels.moe

SCRIPT = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.moe import combine, few, many
INTS = {"chosen", "scale_zero", "order", "block_expert", "block_first", "ends"}
def build(kernel, x="fp16", group=128, warps=4, stages=3, **constants):
    names = kernel.arg_names
    constants = {"ASM": True, "GROUP": group, **constants}
    constants = {k: v for k, v in constants.items() if k in names}
    if group == 0 and "scale_zero" in names: constants["scale_zero"] = None
    def kind(n):
        if n in constants: return "constexpr"
        if n in INTS: return "*i32"
        if n == "weights": return "*fp32"
        if n == "words": return "*i16" if group else "*" + x
        if n in ("x", "out", "parts"): return "*" + x
        return "i64" if n.startswith("stride_") and n != "stride_x" else "i32"
    signature = {n: kind(n) for n in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n] != "constexpr" and n not in ("A", "blocks", "TOPK", "T")}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attrs)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    assert built.asm["cubin"] and built.metadata.shared < 227 * 1024
    return built
for x, group in itertools.product(("fp16", "bf16"), (128, 64, 32, 0)):
    for by in (True, False):
        build(few.moe_few, x, group, EVEN_N=True, EVEN_K=True, PAIRED=by, WEIGHTED=not by, BY_PAIR=by, BP=64 if by else 512, EIGHTS=1 if by else 4, BN=64, warps=4)
    b = build(many.moe_many, x, group, EVEN_N=True, EVEN_K=True, PAIRED=True, WEIGHTED=False, BM=64, BN=128, warps=4)
    assert "wgmma.mma_async" in b.asm["ptx"] and b.metadata.shared > 48 * 1024, "loads of the tokens are not pipelined"
build(combine.sum_experts, TOPK=8, BH=1024)
print("compiled")
"""


def test_kernels_of_experts_compile(build_for_hopper):
    build_for_hopper(SCRIPT)


def test_no_argument_has_a_name_that_launchers_use() -> None:
    """Triton 3.6 builds a launcher in Python whose own variables would be overwritten: an argument `params` fails there."""
    for path in Path(kernels.moe.__path__[0]).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(d) for d in node.decorator_list
            ):
                names = {argument.arg for argument in node.args.args}
                assert not names & {"params", "options", "specialization", "backend"}, (path.name, node.name)
