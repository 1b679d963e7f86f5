"""The scheduler alone: when a newcomer is let in."""

import pytest

from engine.api import Request, SamplingParams
from engine.serving.scheduler import BlockManager, Scheduler, Sequence


def sequence(arrival: int, tokens: int, client: str = "") -> Sequence:
    sampling = SamplingParams(temperature=0.0, max_tokens=100)
    request = Request(str(arrival), tuple(range(tokens)), sampling, client=client)
    return Sequence(request, arrival, seed=0)


def clients(scheduler: Scheduler) -> str:
    return "".join(sorted(s.request.client for s in scheduler.running))


def step(scheduler: Scheduler) -> None:
    """Plan a step, and take in a token of every sequence that draws one."""
    plan = scheduler.schedule()
    if plan is not None:
        rows = [segment.row for segment in plan.segments]
        assert len(rows) == len(set(rows)), "two sequences share a row"
        assert {join.row for join in plan.joins} <= set(rows)
        for segment, drawn in zip(plan.segments, plan.sequences, strict=True):
            if segment.samples:
                drawn.output_ids.append(1)


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


def test_a_client_that_comes_late_gets_its_share_of_full_rows() -> None:
    """Eight places are taken by one client; another one's sequences take turns with them until both have four."""
    scheduler = Scheduler(BlockManager(400, 4), max_batch=8, max_step_tokens=1000)
    for arrival in range(20):
        scheduler.add(sequence(arrival, 4, "a"))
    step(scheduler)
    assert clients(scheduler) == "aaaaaaaa"
    for arrival in range(20, 30):
        scheduler.add(sequence(arrival, 4, "b"))
    for _ in range(20):
        step(scheduler)
    assert clients(scheduler) == "aaaabbbb"
    assert scheduler.preemptions == 4  # once for each place that changed hands, and no more
    oldest = [s.arrival for s in scheduler.running if s.request.client == "a"]
    assert oldest == [0, 1, 2, 3]  # the youngest gave way
    assert [s.arrival for s in scheduler.waiting if s.request.client == "a"][:4] == [4, 5, 6, 7]


def test_a_client_that_comes_late_gets_its_share_of_a_full_cache() -> None:
    scheduler = Scheduler(BlockManager(16, 4), max_batch=8, max_step_tokens=1000)
    for arrival in range(6):
        scheduler.add(sequence(arrival, 11, "a"))  # three blocks each: five fit
    step(scheduler)
    assert clients(scheduler) == "aaaaa"
    scheduler.add(sequence(6, 9, "b"))
    for _ in range(3):
        step(scheduler)
    assert "b" in clients(scheduler)


def test_blocks_are_taken_from_the_client_with_the_most() -> None:
    """The youngest sequence is the only one of its client: another one's gives way where the cache is full."""
    scheduler = Scheduler(BlockManager(8, 4), max_batch=8, max_step_tokens=1000)
    for arrival, client in enumerate("aaab"):
        scheduler.add(sequence(arrival, 7, client))
    step(scheduler)
    assert clients(scheduler) == "aaab"
    for _ in range(4):  # the ninth token of each needs a third block
        step(scheduler)
    assert "b" in clients(scheduler) and scheduler.preemptions > 0


def test_one_client_is_served_by_arrival() -> None:
    scheduler = Scheduler(BlockManager(400, 4), max_batch=2, max_step_tokens=1000)
    for arrival in range(6):
        scheduler.add(sequence(arrival, 4, "a"))
    step(scheduler)
    assert [s.arrival for s in scheduler.running] == [0, 1]
    scheduler.finish(scheduler.running[0])
    step(scheduler)
    assert [s.arrival for s in scheduler.running] == [1, 2] and scheduler.preemptions == 0
