"""How a W4A16 product on the tensor cores is dealt out to programs, and the scratch memory that programs of one tile share.

M tokens, N rows of the weight, KB blocks of 128 along K. Counts only: knows nothing of what a kernel does with its share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.w4a16_unpack import check_dependent

MAX_SEGMENTS = 16
UNROLLED = 4096  # elements of a tile up to which its partial sums are added unrolled
MAX_TILES = 1 << 16
PARTIAL_FLOATS = 1 << 24  # 64 MiB: two tiles of at most BM x BN for each program


@dataclass(frozen=True)
class GemmTile:
    """How `w4_matmul` cuts a product: tile BM x BN, operand order, where the scale goes, and how many programs share the work.

    `programs_per_sm` programs are started for each multiprocessor (0: one for each tile, so that no tile is shared).
    `stacked`: one dot for each block of 128 k in place of four; the weights are the left operand and scaled first.
    `dependent`: when a dependent launch lets the kernel behind it start: "early" (at once), "waited" (when the kernel ahead
    has ended), "late" (when the products are done), or "never" where a plain launch was measured to be faster.
    """

    bm: int
    bn: int
    warps: int
    stages: int
    swap: bool
    scale_first: bool
    programs_per_sm: float
    stacked: bool = False
    dependent: str = "early"

    def __post_init__(self) -> None:
        if self.stacked and not (self.swap and self.scale_first):
            raise ValueError(
                "a stacked tile has the weights as left operand, scaled first: set swap and scale_first."
            )
        check_dependent(self.dependent)


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of shared tiles on one device: partial (float32) and arrived (int32, all zero between launches).

    Products that use one workspace must be ordered on the device (one stream, or dependent launches).
    """

    partial: Tensor
    arrived: Tensor

    @staticmethod
    def on(device: torch.device) -> "Workspace":
        return Workspace(
            torch.empty(PARTIAL_FLOATS, dtype=torch.float32, device=device),
            torch.zeros(MAX_TILES, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class Schedule:
    """Programs of a launch, units of each, the most programs that share a tile."""

    programs: int
    run: int
    segments: int


def schedule(tokens: int, rows: int, blocks: int, tile: GemmTile, multiprocessors: int) -> Schedule:
    """Deal tiles * blocks units out in equal runs. Whole tiles where sharing would not fit the workspace."""
    tiles = -(-tokens // tile.bm) * -(-rows // tile.bn)
    total = tiles * blocks
    programs = min(round(tile.programs_per_sm * multiprocessors), total)
    slots = PARTIAL_FLOATS // (2 * tile.bm * tile.bn)
    if programs == 0 or programs > slots or tiles > MAX_TILES:
        return Schedule(tiles, blocks, 1)
    run = max(-(-total // programs), -(-blocks // (MAX_SEGMENTS - 1)))
    most = 1 if run % blocks == 0 else (blocks - 1) // run + 2 - (blocks % run == 0)
    segments = 1
    while segments < most:  # rounded up to a power of two: fewer binaries
        segments *= 2
    return Schedule(-(-total // run), run, segments)


def compiled_segments(tile: GemmTile, plan: Schedule) -> int:
    """The SEGMENTS that the kernel is compiled for: few values, since only small tiles unroll their sums."""
    return plan.segments if tile.bm * tile.bn <= UNROLLED else min(plan.segments, 2)
