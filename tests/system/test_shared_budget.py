"""Threads that share a budget wait for each other, and none of them for ever."""

import threading

import pytest

from gguflora.system.shared_budget import SharedBudget


def test_no_more_than_the_budget_is_used_at_once():
    budget, lock, used, most = SharedBudget(10), threading.Lock(), [0], [0]
    together = threading.Barrier(2, timeout=30)

    def work(part):
        with budget.take(part):
            with lock:
                used[0] += part
                most[0] = max(most[0], used[0])
            if part == 5:
                together.wait()  # two fives have room at the same time
            with lock:
                used[0] -= part

    threads = [threading.Thread(target=work, args=(part,)) for part in (5, 5, 7, 8, 30, 2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert most[0] == 30  # more than there is, but alone


def test_a_part_is_given_back_after_an_error():
    budget = SharedBudget(4)
    with pytest.raises(ValueError, match="broken"), budget.take(4):
        raise ValueError("broken")
    with budget.take(4):
        pass
