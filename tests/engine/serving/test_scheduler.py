"""The scheduler alone: when a newcomer is let in."""

import pytest

from engine.api import Request, SamplingParams
from engine.serving.scheduler import BlockManager, Scheduler, Sequence


def sequence(arrival: int, tokens: int) -> Sequence:
    request = Request(str(arrival), tuple(range(tokens)), SamplingParams(temperature=0.0, max_tokens=100))
    return Sequence(request, arrival, seed=0)


@pytest.mark.parametrize(("spare", "admitted"), [(1, False), (2, True)])
def test_a_newcomer_leaves_a_block_to_each_running_sequence(spare: int, admitted: bool) -> None:
    """Two run, so that two blocks stay free beside the newcomer's; or it would be thrown out at their next block."""
    scheduler = Scheduler(BlockManager(32, 4), max_batch=8, max_step_tokens=1000)
    for arrival in range(2):
        scheduler.add(sequence(arrival, 8))
    assert scheduler.schedule() is not None and len(scheduler.running) == 2
    scheduler.add(sequence(2, 4 * (scheduler.blocks.free - 2 - spare)))
    scheduler.schedule()  # the two grow by a block each
    assert (len(scheduler.running) == 3) is admitted and scheduler.preemptions == 0
