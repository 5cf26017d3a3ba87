"""Work on several items at once, in threads that divide the cores of the job."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stopped(Exception):
    """The other items of this work are not wanted any more."""


def side_by_side(
    work: Callable[[Item, threading.Event], Result], items: Sequence[Item], at_once: int
) -> Generator[Result, None, None]:
    """Yield `work(item, stopped)` for each item, in their order, `at_once` items at a time.

    PyTorch releases Python's lock while it computes, so two threads with one core each are faster
    than one thread with two cores where much of the time is in operations that one core computes.
    If an item fails, or the caller stops, `stopped` is set; `work` should look at it now and then
    and raise Stopped.
    """
    stopped = threading.Event()
    cores = torch.get_num_threads()
    at_once = min(at_once, cores, len(items))
    if at_once <= 1:
        for item in items:
            yield work(item, stopped)
        return

    def with_share_of_cores(item: Item) -> Result:
        torch.set_num_threads(cores // at_once)  # holds for the calling thread
        return work(item, stopped)

    threads = ThreadPoolExecutor(at_once)
    results = [threads.submit(with_share_of_cores, item) for item in items]
    try:
        for result in results:
            yield result.result()
    finally:
        stopped.set()
        threads.shutdown(cancel_futures=True)  # waits for the items that have begun
        torch.set_num_threads(cores)
