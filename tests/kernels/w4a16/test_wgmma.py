"""The Gluon kernel for Hopper: compiled for sm_90 without a GPU and without serialized products; its tiles; who may have it."""

from collections.abc import Callable
from itertools import product

import pytest

from kernels.w4a16 import product as w4a16
from kernels.w4a16.prefill import PrefillTile
from kernels.w4a16.schedule import MAX_SEGMENTS, MAX_TILES, GemmTile, WgmmaTile, schedule

SCRIPT = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from kernels.w4a16 import wgmma as w4a16_wgmma

def build(half, parts, **constants):
    constants = dict(GROUP=128, HAS_BIAS=True, HAS_RESIDUAL=True, PAIRED=False, PENDING=1, SHARED=True, PARTS=parts, DEPENDENT="never") | constants
    x, words, params = w4a16_wgmma.operand_layouts()
    kinds = {
        "x_desc": f"tensordesc<{half}[{constants['BM']}, 128],{x!r}>",
        "word_desc": f"tensordesc<i16[{constants['BN']}, 32],{words!r}>",
        "param_desc": f"tensordesc<i32[{constants['BN']}],{params!r}>",
        "out": "*" + half, "bias": "*fp32", "residual": "*" + half, "partial": "*fp32", "arrived": "*i32",
    }
    names = w4a16_wgmma.w4_wgmma.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    source = GluonASTSource(w4a16_wgmma.w4_wgmma, signature, {(names.index(n),): v for n, v in constants.items()}, {})
    options = {"num_warps": 4} | ({"maxnreg": 128} if parts == 1 else {})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.asm["cubin"] and built.metadata.shared <= 227 * 1024, built.metadata.shared
    assert "wgmma.wait_group.sync.aligned 1" in built.asm["ptx"]

build("fp16", 2, BM=128, BN=256, STAGES=4)
build("bf16", 2, BM=64, BN=256, STAGES=5, GROUP=32, PAIRED=True, DEPENDENT="waited")
build("fp16", 1, BM=64, BN=128, STAGES=3, GROUP=64, SHARED=False)
build("fp16", 4, BM=64, BN=256, STAGES=5)
print("compiled")
"""


def test_compiles_for_hopper_with_products_side_by_side(build_for_hopper: Callable[..., str]) -> None:
    pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
    assert "serialized" not in build_for_hopper(SCRIPT, TRITON_DUMP_PTXAS_LOG="1")


@pytest.mark.parametrize(
    "tile", [WgmmaTile(128, 256, 2, 4, 1), WgmmaTile(64, 128, 1, 3, 2), WgmmaTile(256, 128, 2, 3, 0)]
)
@pytest.mark.parametrize(
    ("tokens", "rows", "blocks"), [(128, 22016, 32), (300, 4104, 112), (64, 1000, 5), (1, 64, 1)]
)
def test_programs_cover_each_unit_once_and_agree_on_slots(
    tile: WgmmaTile, tokens: int, rows: int, blocks: int
) -> None:
    """The kernel's own arithmetic: which programs share a tile, and in which slot each leaves its sum."""
    plan = schedule(tokens, rows, blocks, tile, 132)
    tiles = -(-tokens // tile.bm) * -(-rows // tile.bn)
    units: list[int] = []
    left: dict[int, list[tuple[int, int]]] = {}
    for program in range(plan.programs):
        begin, end = program * plan.run, min((program + 1) * plan.run, tiles * blocks)
        assert begin < end
        for t in range(begin // blocks, (end + blocks - 1) // blocks):
            b0, b1 = max(begin - t * blocks, 0), min(end - t * blocks, blocks)
            assert b0 < b1
            units += range(t * blocks + b0, t * blocks + b1)
            left.setdefault(t, []).append((program, program * 2 + (t != begin // blocks)))
    assert units == list(range(tiles * blocks))
    slots = [slot for sharers in left.values() if len(sharers) > 1 for _, slot in sharers]
    assert len(set(slots)) == len(slots)
    for t, sharers in left.items():
        first = t * blocks // plan.run
        segments = (t * blocks + blocks - 1) // plan.run - first + 1
        assert len(sharers) == segments <= max(plan.segments, 1) <= MAX_SEGMENTS
        assert sharers == [(p, p * 2 + (t != p * plan.run // blocks)) for p in range(first, first + segments)]


def test_tiles_that_do_not_fit_are_refused() -> None:
    for fields in [
        (128, 256, 3, 4, 0), (128, 512, 2, 2, 0), (256, 256, 2, 2, 0), (48, 128, 2, 4, 0),
        (128, 256, 2, 5, 0), (128, 256, 2, 1, 0), (128, 256, 2, 4, 0, 0), (64, 64, 2, 4, 0), (64, 512, 4, 2, 0),
    ]:  # fmt: skip
        with pytest.raises(ValueError):
            WgmmaTile(*fields)


def test_fewer_stages_where_groups_are_small() -> None:
    tile = WgmmaTile(256, 128, 2, 3, 0)
    assert [tile.stages_for(group) for group in (128, 64, 32)] == [3, 2, 2]
    for bm, bn, group in product((64, 128), (128, 256), (32, 64, 128)):
        stages = WgmmaTile(bm, bn, 2, 3, 0).stages_for(group)
        assert stages * (bm * 256 + bn * (64 + 512 // group)) + bn * 64 < 227 * 1024


def test_entries_are_passed_over_where_the_kernel_cannot_run() -> None:
    hopper, plain = WgmmaTile(128, 256, 2, 4, 1), GemmTile(128, 64, 4, 3, True, True, 1)
    table = (w4a16.Entry(4096, 4096, 128, hopper), w4a16.Entry(4096, 4096, 256, plain))
    size = w4a16.Size(4096, 4096)
    assert w4a16.pick(table, 100, size, has_wgmma=True) == hopper
    assert w4a16.pick(table, 100, size) == plain
    assert w4a16.pick(table, 100, w4a16.Size(4098, 4096), has_wgmma=True) == plain
    assert w4a16.pick(table, 100, w4a16.Size(4096, 4100), has_wgmma=True) == plain
    assert w4a16.pick(table[:1], 100, size) == PrefillTile(0)


def test_a_table_may_name_it() -> None:
    row = {"k": 1, "n": 1, "tokens": 64, "kernel": "wgmma", "bm": 64, "bn": 256, "parts": 2, "stages": 5}
    row |= {"programs_per_sm": 1, "pending": 2}
    assert w4a16.parse_table({"entries": [row]})[0].tile == WgmmaTile(64, 256, 2, 5, 1, 2)


def test_a_product_with_more_shared_tiles_than_counters_keeps_its_tiles_whole():
    tile = WgmmaTile(64, 128, 2, 3, 1)
    rows = 128 * (MAX_TILES // 2)
    assert schedule(64, rows, 8, tile, 131, tile.parts).segments > 1
    assert schedule(64, rows + 128, 8, tile, 131, tile.parts).segments == 1
    assert schedule(64, rows + 128, 8, tile, 131).segments > 1
