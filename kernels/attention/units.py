"""How paged decode attention is shared out among programs: on the device by the lengths, on the host by shapes alone.

B sequences, Hkv kv heads, N tokens of a tile. The tiles of all sequences are cut into *units* of at most C tiles, so that one long
sequence in a batch does not make the others wait and the programs fill whole waves of the device. Every program derives C and its
unit from context_lens alone, so the grid depends on shapes only and a CUDA graph serves any lengths.
"""

# mypy: disable-error-code="no-untyped-def"

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def share_tiles(lens_ptr, row, batch, aim, TILE: tl.constexpr, WINDOW: tl.constexpr, EVEN: tl.constexpr):
    """Units of each sequence (one for an empty one: it writes zeros) and the most tiles of a unit.

    EVEN: `aim` units in all at most, batch <= aim. The most tiles of a unit is the least of eight candidates that keeps to it,
    from total / aim, which rounding up in each sequence may exceed, to total / (aim - batch), which cannot.
    Else: total / aim, so that only sequences longer than that are cut; batch + aim units at most.
    """
    lens = tl.load(lens_ptr + row, mask=row < batch, other=0)
    tiles = (lens + TILE - 1) // TILE
    if WINDOW > 0:
        tiles -= tl.maximum(lens - WINDOW, 0) // TILE
    if EVEN:
        step = tl.arange(0, 8)
        slots = 8 * aim - tl.where(step == 7, 8, step) * batch
        candidates = (tl.sum(tiles, 0) * 8 + slots - 1) // tl.maximum(slots, 1)
        candidates = tl.maximum(tl.where(slots > 0, candidates, tl.max(tiles, 0)), 1)
        tried = tl.maximum((tiles[None, :] + candidates[:, None] - 1) // candidates[:, None], 1)
        needed = tl.sum(tl.where(row[None, :] < batch, tried, 0), 1)
        most = tl.min(tl.where(needed <= aim, candidates, 1 << 30), 0)
    else:
        most = tl.maximum((tl.sum(tiles, 0) + aim - 1) // aim, 1)
    units = tl.where(row < batch, tl.maximum((tiles + most - 1) // most, 1), 0)
    return units, most


@triton.jit
def find_unit(
    lens_ptr, batch, aim, unit, TILE: tl.constexpr, WINDOW: tl.constexpr, EVEN: tl.constexpr, BATCH_PAD: tl.constexpr
):  # fmt: skip
    """Which tiles a unit covers: sequence, its length, index of its first unit, its number of units, tiles a unit, first tile.

    The sequence is `batch` or more where the unit is not used.
    """
    if BATCH_PAD == 1:  # scalars alone, a few hundred cycles sooner
        seq = 0
        start = 0
        length = tl.load(lens_ptr)
    else:
        row = tl.arange(0, BATCH_PAD)
        shares, most = share_tiles(lens_ptr, row, batch, aim, TILE, WINDOW, EVEN)
        seq = tl.sum((tl.cumsum(shares, 0) <= unit).to(tl.int32), 0)
        start = tl.sum(tl.where(row < seq, shares, 0), 0)
        length = tl.load(lens_ptr + tl.minimum(seq, batch - 1))
    tile0 = 0
    if WINDOW > 0:
        tile0 = tl.maximum(length - WINDOW, 0) // TILE
    tiles = (length + TILE - 1) // TILE - tile0
    if BATCH_PAD == 1:
        most = tl.maximum((tiles + aim - 1) // aim, 1)
    count = tl.maximum((tiles + most - 1) // most, 1)
    if BATCH_PAD == 1:
        seq = (unit >= count).to(tl.int32)
    return seq, length, start, count, (tiles + count - 1) // count, tile0


@dataclass(frozen=True)
class DecodeConfig:
    """Tuning of one launch: tokens of a tile, warps, pipeline stages, programs meant to be resident on each multiprocessor.

    min_per_sm: as many programs on each multiprocessor keep memory busy: where whole sequences make these, none is cut for more. 0: per_sm.
    max_fused_units: units of a sequence, on average, up to which its last one merges several query heads itself; more are merged by a second kernel.
    """

    tile: int
    num_warps: int
    num_stages: int
    per_sm: int
    min_per_sm: int = 0
    max_fused_units: int = 0


# Tuned on an H200; see benchmarks/NOTES.md. (bits, whether query heads share kv heads) -> config
CONFIGS: dict[tuple[int, bool], DecodeConfig] = {
    (16, False): DecodeConfig(64, 4, 4, 1),
    (16, True): DecodeConfig(64, 4, 4, 1),
    (8, False): DecodeConfig(64, 2, 3, 4),
    (8, True): DecodeConfig(64, 2, 3, 4, min_per_sm=2, max_fused_units=4),
}
BATCH_PADS = (1, 16, 128, 1024)  # few sizes, so that few binaries serve all batches
EXTRA_WAVES = 5  # more waves than needed that may be run to fill them evenly
MIN_WAVE_FILL = 0.9


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # the interpreter: any number does
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def wave(per_sm: int, num_kv_heads: int, device: torch.device) -> int:
    """Units of one kv head that are resident together."""
    return max(1, per_sm * _multiprocessors(device) // num_kv_heads)


def share(resident: int, batch: int, least: int = 0) -> tuple[int, int, bool]:
    """(`aim`, bound on the units, EVEN) of `share_tiles` for a batch, from shapes alone.

    A small batch is cut into whole waves of units: the fewest that equal lengths nearly fill, so that no wave runs half empty.
    Where that is one unit a sequence, only those longer than the mean are cut; where the batch fills waves of `least` units, only
    those longer than twice the mean.
    """
    fewest = -(-batch // resident)
    waves = range(fewest, fewest + EXTRA_WAVES + 1)
    fill = {n: (n * resident // batch) * batch / (n * resident) for n in waves}
    target = resident * next(
        (n for n in waves if fill[n] >= MIN_WAVE_FILL), max(waves, key=lambda n: fill[n])
    )
    if batch > 1 and target // batch == 1:
        aim = min(2 * resident, batch)
        return aim, batch + aim, False
    if batch > 1 and least > 0 and batch >= MIN_WAVE_FILL * least * -(-batch // least):
        return batch // 2, batch + batch // 2, False
    return target, target, True


def max_units(max_batch: int, num_kv_heads: int, device: torch.device | str) -> int:
    """A bound on the units of any batch up to max_batch."""
    resident = max(wave(config.per_sm, num_kv_heads, torch.device(device)) for config in CONFIGS.values())
    return 2 * max_batch + (EXTRA_WAVES + 1) * resident
