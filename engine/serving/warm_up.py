"""Steps that a runner takes before the first request, so that no request waits for kernels to be compiled or loaded.

Kernels are chosen by the number of tokens in a step (ours in tiles that differ between powers of two, cuBLAS's in smaller steps) and
by the number of sequences that decode beside a prompt.
"""

from collections.abc import Iterator

from engine.api import SamplingParams
from engine.config import EngineConfig
from engine.serving.scheduler import Join, Segment, StepPlan

GREEDY = SamplingParams(temperature=0.0)


def warm_up_plans(config: EngineConfig, num_blocks: int, context_length: int) -> Iterator[StepPlan]:
    """Prompts alone, eight lengths an octave, then 1, 2, 4, ... sequences that decode beside a prompt; those that fit."""
    most = min(config.max_step_tokens, context_length, num_blocks * config.block_size)
    for tokens in _sizes(most, 8):
        yield _plan(0, tokens, config.block_size)
    for decodes in _sizes(min(config.max_batch, num_blocks) - 1, 1):
        room = min(most - decodes, (num_blocks - decodes) * config.block_size)
        if room > 0:
            yield _plan(decodes, room, config.block_size)


def _sizes(most: int, parts: int) -> list[int]:
    """1 .. `most`, evenly `parts` sizes between each power of two and the next, and `most` itself; nothing below 1."""
    octaves = range(max(0, most).bit_length())
    sizes = {(1 << octave) + (part << octave) // parts for octave in octaves for part in range(parts)}
    return sorted({size for size in sizes if size <= most} | ({most} if most > 0 else set()))


def _plan(decodes: int, tokens: int, block_size: int) -> StepPlan:
    """`decodes` sequences at their second token, one block each, and a prompt of `tokens` in the blocks behind them."""
    segments = [Segment(row, 1, 1, (), (row,), samples=True) for row in range(decodes)]
    blocks = tuple(range(decodes, decodes - (-tokens // block_size)))
    segments.append(Segment(decodes, 0, tokens, (0,) * tokens, blocks, samples=True))
    joins = tuple(Join(row, GREEDY, 0, (0,), ()) for row in range(decodes + 1))
    return StepPlan(tuple(segments), joins, ())
