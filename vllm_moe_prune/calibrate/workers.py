"""All cores for many small jobs: small matrices do not feed several cores each.

What a job computes does not depend on how many workers there are: each runs on one
thread, and writes what no other one reads.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Job = TypeVar("Job")
SMALL = 1 << 21
"""Weights of a matrix up to which one core is used for each job."""


class Workers:
    """Runs jobs side by side, or in turn where there is one worker."""

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        """Use a pool, or this thread."""
        self._pool = pool

    def run(self, work: Callable[[Job], None], jobs: Sequence[Job]) -> None:
        """Do all of the jobs; the error of the first that failed is raised."""
        if self._pool is None or len(jobs) < 2:
            for job in jobs:
                work(job)
            return

        def one(job: Job) -> None:
            # Gradients are a thread's own setting.
            with torch.no_grad():
                work(job)

        waiting = [self._pool.submit(one, job) for job in jobs]
        try:
            for each in waiting:
                each.result()
        finally:
            # Nothing of a failed layer runs on behind the error.
            for each in waiting:
                each.cancel()


@contextmanager
def workers(device: torch.device, weights: int) -> Iterator[Workers]:
    """One worker for each thread that PyTorch may use, if that pays.

    Args:
        device: Where the jobs compute; on a GPU they run in turn.
        weights: Of the largest matrix that they multiply with.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or weights > SMALL:
        yield Workers(None)
        return
    # Before the pool: its threads take the setting over when they begin.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield Workers(pool)
    finally:
        torch.set_num_threads(threads)
