"""The clock of the stages: what is counted where, and that nothing is counted without one."""

import threading

import pytest
import torch

from quant import stage_clock
from quant.stage_clock import OTHER, StageClock, block_done, measuring, stage


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves one second at each look."""
    now = iter(range(1000))
    monkeypatch.setattr(stage_clock.time, "perf_counter", lambda: float(next(now)))


@pytest.mark.usefixtures("ticks")
def test_a_stage_inside_another_is_not_counted_twice() -> None:
    clock = StageClock(torch.device("cpu"))  # looks at 0
    with measuring(clock):  # 1
        with stage("outer"), stage("inner"):  # begin at 2 and 3, end at 4 and 5
            pass
        with stage("inner"):  # 6 to 7
            pass
    assert clock.seconds == {OTHER: 4.0, "outer": 2.0, "inner": 2.0}


@pytest.mark.usefixtures("ticks")
def test_a_stage_that_fails_ends_too() -> None:
    clock = StageClock(torch.device("cpu"))
    with measuring(clock):
        with pytest.raises(KeyError), stage("broken"):
            raise KeyError
        with stage("whole"):
            pass
    assert clock.seconds["broken"] == 1.0
    assert clock.seconds["whole"] == 1.0


@pytest.mark.usefixtures("ticks")
def test_block_seconds_are_those_between_the_ends_of_blocks() -> None:
    clock = StageClock(torch.device("cpu"))
    with measuring(clock):
        for _ in range(3):
            with stage("work"):
                pass
            block_done()
    assert clock.block_seconds() == [3.0, 3.0]


def test_outside_a_measurement_and_in_other_threads_nothing_is_counted() -> None:
    clock = StageClock(torch.device("cpu"))
    with stage("before"):
        block_done()

    @stage("decorated")
    def work() -> None:
        block_done()

    with measuring(clock):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    work()
    assert set(clock.seconds) == {OTHER}
    assert not clock.block_ends
