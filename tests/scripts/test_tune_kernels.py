"""Tables of tiles made of measurements: what a refinement keeps, replaces and leaves for a Triton without Gluon."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from kernels.w4a16.gemv import GemvTile
from kernels.w4a16.prefill import PrefillTile
from kernels.w4a16.product import Size, Tile, parse_table, pick
from kernels.w4a16.schedule import GemmTile, WgmmaTile

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from tile_candidates import binary_key, gemv_tiles
from tune_kernels import END, make_table


def row(kernel: str, tile: Tile, tokens: int, **times: float) -> dict[str, Any]:
    return {
        "k": 4096,
        "n": 4096,
        "tokens": tokens,
        "kernel": kernel,
        **dataclasses.asdict(tile),
        "roof_us": 3.0,
        "error": 3e-4,
        **times,
    }


WGMMA = row("wgmma", WgmmaTile(64, 64, 1, 4, 2), 64, waited_us=10.5, early_us=10.1)
GEMM = row("gemm", GemmTile(64, 64, 4, 4, True, True, 1), 64, never_us=14.6, late_us=15.0)
OLD = {
    "k": 4096,
    "n": 4096,
    "kernel": "gemm",
    **dataclasses.asdict(GemmTile(32, 64, 4, 4, False, True, 2)),
}
KEPT = [
    {**OLD, "tokens": 64},
    {**OLD, "tokens": 8},
    {"k": 4096, "n": 4096, "tokens": END, "kernel": "prefill", "rows": 8192},
]
HERE = Size(4096, 4096)


def test_the_fastest_tile_stands_first_and_another_behind_it_for_a_triton_without_gluon() -> None:
    table = parse_table(make_table({"gpu": "any", "rows": [GEMM, WGMMA]}, []))
    assert pick(table, 40, HERE, has_wgmma=True) == WgmmaTile(64, 64, 1, 4, 2, dependent="early")
    assert pick(table, 40, HERE) == GemmTile(64, 64, 4, 4, True, True, 1, dependent="never")
    assert pick(table, 65, HERE, has_wgmma=True) == PrefillTile(8192)


def test_a_refinement_keeps_the_cells_that_it_has_not_measured() -> None:
    made = make_table({"gpu": "any", "rows": [GEMM, WGMMA]}, KEPT)
    assert [(entry["tokens"], entry["kernel"]) for entry in made["entries"]] == [
        (8, "gemm"),
        (64, "wgmma"),
        (64, "gemm"),
        (END, "prefill"),
    ]


def test_a_failed_or_slower_tile_leaves_nothing_behind() -> None:
    wrong = {**WGMMA, "failure": "relative error 1"}
    slow = {**WGMMA, "waited_us": 20.0, "early_us": 21.0}
    for other in (wrong, slow):
        made = make_table({"gpu": "any", "rows": [GEMM, other]}, KEPT)
        assert [entry["kernel"] for entry in made["entries"] if entry["tokens"] == 64] == ["gemm"]


def test_shapes_share_a_tile_that_is_nearly_the_fastest_of_each() -> None:
    slow = row("wgmma", WgmmaTile(64, 128, 1, 3, 2), 64, waited_us=10.15)
    fast = row("wgmma", WgmmaTile(64, 128, 1, 3, 2), 64, waited_us=20.0) | {"n": 8192}
    slower = WGMMA | {"n": 8192, "waited_us": 22.0, "early_us": 21.0}
    made = make_table({"gpu": "any", "rows": [WGMMA, slow, fast, slower]}, [])
    assert [(entry["n"], entry["bn"]) for entry in made["entries"] if entry["tokens"] == 64] == [
        (4096, 128),
        (8192, 128),
    ]


def test_tiles_that_differ_in_what_they_ask_for_ahead_are_compiled_apart() -> None:
    tiles = gemv_tiles()
    keys = {binary_key(tile, "waited", 1, 4096, 4096, 128, 132) for tile in tiles}
    assert len(keys) == len(tiles) and {tile.ahead for tile in tiles if isinstance(tile, GemvTile)} > {0}
