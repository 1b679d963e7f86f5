"""Jobs in the background: their order, their errors, and that nothing is left undone."""

import threading

import pytest

from quant.state.write_behind import PENDING, WriteBehind


def test_jobs_are_done_in_order_and_all_before_the_end() -> None:
    done: list[int] = []
    with WriteBehind() as behind:
        for number in range(20):
            behind.put(lambda number=number: done.append(number))
        behind.wait()
        assert done == list(range(20))
        behind.put(lambda: done.append(20))
    assert done == list(range(21))


def test_an_error_comes_back_and_no_job_after_it_is_done() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), WriteBehind() as behind:
        behind.put(lambda: done.append(0))
        behind.put(fail)
        behind.put(lambda: done.append(1))
        behind.put(lambda: done.append(2))
    assert done == [0]


def test_the_error_of_the_run_itself_is_the_one_that_is_raised() -> None:
    def fail() -> None:
        raise OSError("full")

    with pytest.raises(KeyError), WriteBehind() as behind:
        behind.put(fail)
        raise KeyError


def test_no_more_jobs_wait_than_memory_is_meant_for() -> None:
    gate, begun = threading.Event(), []
    with WriteBehind() as behind:
        for number in range(PENDING):
            behind.put(lambda number=number: (begun.append(number), gate.wait(5)))
        late = threading.Thread(target=lambda: behind.put(lambda: begun.append(PENDING)))
        late.start()
        late.join(0.05)
        assert late.is_alive()  # it waits for a place
        gate.set()
        late.join(5)
    assert sorted(begun) == list(range(PENDING + 1))
