"""How a W4A16 product on the tensor cores is dealt out to programs, and the scratch memory that programs of one tile share.

M tokens, N rows of the weight, KB blocks of 128 along K. Counts only: knows nothing of what a kernel does with its share.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.w4a16.unpack import check_dependent

MAX_SEGMENTS = 16
UNROLLED = 4096  # elements of a tile up to which its partial sums are added unrolled
MAX_TILES = 1 << 16
SHARED_BYTES = 227 * 1024  # of one program on compute capability 9.0
PARTIAL_FLOATS = 1 << 24  # 64 MiB: two tiles of at most BM x BN for each program


@dataclass(frozen=True)
class GemmTile:
    """How `w4_matmul` cuts a product: tile BM x BN, operand order, where the scale goes, and how many programs share the work.

    `programs_per_sm` programs are started for each multiprocessor (0: one for each tile, so that no tile is shared).
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
    dependent: str = "early"

    def __post_init__(self) -> None:
        check_dependent(self.dependent)


@dataclass(frozen=True)
class WgmmaTile:
    """How `w4_wgmma` cuts a product: tiles of BM tokens by BN rows, `parts` warp groups of BN / parts rows each.

    `stages` blocks are kept in shared memory; up to `pending` groups of products run while the next operand is unpacked.
    `programs_per_sm` and `dependent` as in `GemmTile`. Raises ValueError on what the kernel does not compile for.
    """

    bm: int
    bn: int
    parts: int
    stages: int
    programs_per_sm: float
    pending: int = 1
    dependent: str = "never"

    def __post_init__(self) -> None:
        check_dependent(self.dependent)
        if self.parts not in (1, 2, 4) or self.bn not in (64 * self.parts, 128 * self.parts) or self.bn > 256:
            raise ValueError(
                f"bn {self.bn} for {self.parts} warp groups: 1, 2 or 4 groups of 64 or 128 rows each, 256 in all."
            )
        if self.bm not in (16, 32, 64, 128, 256) or self.bm * self.bn // self.parts > 128 * 128:
            raise ValueError(
                f"bm {self.bm} by {self.bn // self.parts} rows: 16 to 256 tokens, and sums of at most 128 x 128 a warp group."
            )
        if self.stages < 2 or self.stages_for(128) < self.stages:
            raise ValueError(
                f"{self.stages} stages of {self.bm} tokens by {self.bn} rows: 2 at least, {self.stages_for(128)} fit."
            )
        if self.pending not in (1, 2):
            raise ValueError(f"pending is {self.pending}: 1 or 2 groups of products.")

    def stages_for(self, group_size: int) -> int:
        """`stages`, or as many as fit into shared memory beside what the epilogue moves at a time (16 tokens, float32)."""
        stage = self.bm * 256 + self.bn * (64 + 4 * 128 // group_size)
        return min(self.stages, (SHARED_BYTES - self.bn * 64 - 512) // stage)


class Cut(Protocol):
    """What `schedule` reads of a tile."""

    @property
    def bm(self) -> int: ...
    @property
    def bn(self) -> int: ...
    @property
    def programs_per_sm(self) -> float: ...


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


def schedule(
    tokens: int, rows: int, blocks: int, tile: Cut, multiprocessors: int, counters: int = 1
) -> Schedule:
    """Deal tiles * blocks units out in equal runs. Whole tiles where sharing would not fit the workspace, of which a tile takes
    `counters` counters."""
    tiles = -(-tokens // tile.bm) * -(-rows // tile.bn)
    total = tiles * blocks
    programs = min(round(tile.programs_per_sm * multiprocessors), total)
    slots = PARTIAL_FLOATS // (2 * tile.bm * tile.bn)
    if programs == 0 or programs > slots or tiles * counters > MAX_TILES:
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
