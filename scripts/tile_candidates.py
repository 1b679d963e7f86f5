"""Which W4A16 tiles are worth timing for a shape, and which of them share a compiled binary. Launches nothing.

M tokens, N rows of the weight, K in features. A candidate is first in some cell of a wider search on an H200, or is new and
has a predicted gain in benchmarks/NOTES.md; the rest was deleted.
"""

from typing import Any

from kernels.w4a16.gemv import GemvTile
from kernels.w4a16.prefill import PrefillTile
from kernels.w4a16.product import TILE_KINDS, Tile
from kernels.w4a16.schedule import GemmTile, WgmmaTile, compiled_segments, schedule
from kernels.w4a16.split import MAX_TOKENS, SplitTile, pieces

GEMV = [(4, 8, 2), (8, 8, 2), (8, 16, 4), (4, 16, 4)]
GEMV_AHEAD = [(4, 8, 2, 32), (4, 8, 2, 16), (8, 8, 2, 32), (8, 16, 4, 32), (4, 16, 4, 32)]  # and blocks ahead
SPLIT = [(128, 4, 4, 8), (64, 2, 5, 8), (128, 4, 4, 2)]  # bn, warps, stages, ahead


# w4_wgmma: bm, bn, parts, stages, programs a multiprocessor; least and most tokens
WGMMA = [
    (16, 64, 1, 8, (2,), 9, 16),
    (16, 256, 4, 8, (1,), 9, 16),
    (32, 64, 1, 6, (2,), 17, 32),
    (32, 128, 1, 5, (2,), 17, 32),
    (32, 256, 2, 6, (1,), 17, 32),
    (32, 256, 4, 6, (1,), 17, 32),
    (64, 64, 1, 4, (2,), 33, 64),
    (64, 128, 1, 3, (2,), 33, 64),
    (64, 256, 2, 5, (1,), 33, 64),
    (64, 256, 4, 5, (1,), 33, 64),
    (128, 64, 1, 3, (1,), 65, 128),
    (128, 64, 1, 2, (2,), 65, 128),
    (128, 128, 2, 5, (0, 1), 65, 128),
    (128, 256, 2, 4, (0, 1), 65, 2048),
    (128, 256, 4, 4, (0, 1), 65, 512),
    (128, 64, 1, 3, (0,), 129, 256),
    (128, 128, 1, 2, (0,), 257, 512),
    (256, 128, 2, 3, (0, 1), 129, 2048),
]


def kind_of(tile: Tile) -> str:
    return next(name for name, kind in TILE_KINDS.items() if isinstance(tile, kind))


def modes_of(tile: Tile, tokens: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ways of starting the kernel behind: those that a tile is timed with, and more for the fastest tiles of a cell."""
    if isinstance(tile, PrefillTile):
        return ("never",), ()
    if isinstance(tile, WgmmaTile):
        return ("waited",), ("never", "early")
    if isinstance(tile, GemmTile) and tokens > 32:  # it fills the card alone: nothing can start beside it
        return ("never", "late"), ()
    if isinstance(tile, GemmTile):
        return ("never", "waited"), ("early",)
    return ("never", "waited"), ("early", "late")


def candidates(tokens: int, rows: int, cols: int, sms: int) -> list[Tile]:
    """Tiles to time for a product of `tokens` by (rows, cols) on a card of `sms` multiprocessors."""
    tiles: list[Tile] = []
    if tokens == 1:
        tiles += gemv_tiles()
    if tokens <= MAX_TOKENS:
        for bn, warps, stages, ahead in SPLIT:
            for split in splits(rows, cols, bn, sms)[: 2 if ahead == 8 else 1]:
                tiles.append(SplitTile(bn, split, warps, stages, ahead))
    tiles += gemm_tiles(tokens) + wgmma_tiles(tokens)
    return [tile for tile in tiles if is_worth_trying(tile, tokens, rows, cols, sms)]


def gemv_tiles() -> list[Tile]:
    plain: list[Tile] = [GemvTile(*shape) for shape in GEMV]
    return plain + [GemvTile(*shape, ahead=ahead) for *shape, ahead in GEMV_AHEAD]


def wgmma_tiles(tokens: int) -> list[Tile]:
    return [
        WgmmaTile(bm, bn, parts, stages, count)
        for bm, bn, parts, stages, counts, least, most in WGMMA
        if least <= tokens <= most
        for count in counts
    ]


def splits(rows: int, cols: int, bn: int, sms: int) -> list[int]:
    """Numbers of pieces along K, the most promising first, by a model: blocks on the fullest multiprocessor, and the merge.

    A block of 128 rows takes 0.25 us of a multiprocessor (8.7 KB at a 132nd of 4.4 TB/s); a merge 1.5 us and 0.1 us a piece.
    """
    tiles, blocks = -(-rows // bn), cols // 128
    cost: dict[int, float] = {}
    for wanted in range(1, 17):
        split, run = pieces(blocks, wanted)
        programs = tiles * split
        if (split > 1 and run < 4) or programs < sms // 2:
            continue
        waves = (
            -(-programs // sms) if programs < 5 * sms else programs / sms + 0.5
        )  # many: dealt out as they end
        warps_short = max(1.0, 2 * sms * 128 / (programs * bn))  # less than 8 warps do not keep memory busy
        cost[split] = waves * run * 0.25 * bn / 128 * warps_short + (1.5 + 0.1 * split if split > 1 else 0.0)
    return sorted(cost, key=lambda split: cost[split])


def gemm_tiles(tokens: int) -> list[Tile]:
    tiles: list[Tile] = []

    def add(bm: int, bn: int, warps: int, stages: int, order: str, *per_sm: int) -> None:
        """order: "left" has the weights as left operand, "right" and "late" (scaled last) not."""
        tiles.extend(
            GemmTile(bm, bn, warps, stages, order == "left", order != "late", count) for count in per_sm
        )

    if tokens == 1:
        return []
    if tokens <= 8:
        add(8, 128, 4, 4, "left", 2)
        add(16, 128, 4, 4, "right", 3)
    elif tokens <= 16:
        add(16, 128, 4, 4, "right", 2, 3)
        add(16, 64, 2, 5, "late", 4, 6)
    elif tokens <= 32:
        add(32, 64, 4, 4, "right", 2, 3)
        add(32, 64, 4, 5, "left", 3, 0)
        add(32, 128, 4, 4, "left", 2)
    elif tokens <= 64:
        add(64, 64, 4, 4, "left", 1)
        add(64, 128, 4, 4, "left", 2, 0)
        add(64, 128, 8, 4, "left", 0)
        add(64, 256, 8, 4, "left", 1)
    elif tokens <= 128:
        add(128, 64, 4, 3, "left", 1, 2)
        add(128, 128, 4, 3, "left", 0)
        add(128, 128, 8, 3, "left", 0)
        add(128, 256, 8, 4, "left", 2)
    else:
        add(128, 256, 8, 4, "left", 0)
        add(256, 128, 8, 3, "left", 1)
        tiles.append(PrefillTile(8192))
    return tiles


def is_worth_trying(tile: Tile, tokens: int, rows: int, cols: int, sms: int) -> bool:
    """Leave out schedules that give less than 2 blocks to a program, and whole tiles that fill less than half of the card."""
    if not isinstance(tile, GemmTile | WgmmaTile):
        return True
    blocks = cols // 128
    plan = schedule(tokens, rows, blocks, tile, sms)
    if tile.programs_per_sm == 0:
        return plan.programs >= sms // 2
    return plan.run >= 2


def binary_key(
    tile: Tile, mode: str, tokens: int, rows: int, cols: int, group_size: int, sms: int
) -> tuple[Any, ...]:
    """What decides which binary a launch compiles."""
    if isinstance(tile, GemmTile):
        plan = schedule(tokens, rows, cols // 128, tile, sms)
        shape = (tile.bm, tile.bn, tile.warps, tile.stages)
        fields: tuple[Any, ...] = (
            *shape,
            tile.swap,
            tile.scale_first,
            compiled_segments(tile, plan),
        )
    elif isinstance(tile, WgmmaTile):
        shared = schedule(tokens, rows, cols // 128, tile, sms).segments > 1
        fields = (tile.bm, tile.bn, tile.parts, tile.stages, tile.pending, shared)
    elif isinstance(tile, GemvTile):
        shape = (tile.bn, tile.blocks, tile.warps, tile.ahead)
        fields = (*shape, tile.scales_ahead, cols % (tile.blocks * 128) == 0)
    elif isinstance(tile, SplitTile):
        eighths = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
        shape = (tile.bn, tile.warps, tile.stages, eighths)
        fields = (
            *shape,
            mode == "never" or tile.ahead,
            pieces(cols // 128, tile.split)[0],
            rows % tile.bn == 0,
        )
    else:
        fields, mode = (), "never"
    return (kind_of(tile), mode, group_size, *fields)
