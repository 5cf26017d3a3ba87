"""Work side by side: order, shares of the cores, and errors."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest
import torch

from sppo.core.errors import UserError
from sppo.policies.threads import Stopped, side_by_side


@pytest.fixture(autouse=True)
def four_cores():
    """Every test begins with four cores, and must leave them to the next program."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 4


@pytest.mark.parametrize(("at_once", "cores"), [(1, 4), (2, 2), (3, 1), (9, 1)])
def test_results_have_the_order_of_the_items(at_once, cores):
    seen = []

    def work(item: int, stopped: threading.Event) -> int:
        time.sleep(0.01 * (5 - item))  # later items end earlier
        seen.append(torch.get_num_threads())
        return item * item

    assert list(side_by_side(work, range(5), at_once)) == [0, 1, 4, 9, 16]
    assert seen == [4 // min(at_once, 4)] * 5
    assert seen[0] == cores


def test_items_are_worked_on_at_the_same_time():
    met = threading.Barrier(2, timeout=60)  # broken, if the second item waits for the first
    assert list(side_by_side(lambda item, stopped: met.wait() >= 0, "ab", 2)) == [True, True]


def test_nothing_to_do():
    assert list(side_by_side(lambda item, stopped: item, [], 2)) == []


def test_an_error_stops_the_other_items():
    both_began = threading.Barrier(2, timeout=60)
    told = []

    def work(item: int, stopped: threading.Event) -> None:
        if item < 2:
            both_began.wait()
        if item == 0:
            raise UserError("item 0 is damaged; replace it")
        told.append((item, stopped.wait(60)))
        raise Stopped

    with pytest.raises(UserError, match="item 0 is damaged"):
        list(side_by_side(work, range(20), 2))
    assert (1, True) in told
    assert len(told) <= 2, "item 1, and what the other thread had begun"


def test_a_caller_that_leaves_stops_the_work():
    told = []
    began = threading.Event()

    def work(item: int, stopped: threading.Event) -> int:
        if item:
            began.set()
            told.append(stopped.wait(60))
            raise Stopped
        return item

    with (
        pytest.raises(KeyboardInterrupt),
        closing(side_by_side(work, range(20), 2)) as results,
    ):
        next(results)
        assert began.wait(60)
        raise KeyboardInterrupt
    assert told and all(told)
    assert len(told) <= 2, "the items that had begun, and no other"
