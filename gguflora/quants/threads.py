"""Distribute the rows of a tensor over threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from gguflora.system.cpus import thread_count


def run_rows(n_rows: int, block_rows: int, work: Callable[[int, int], None], threads: int | None) -> None:
    """Call ``work(start, stop)`` for all rows, in ranges of at most ``block_rows``, on several threads.

    After the first error no further range is started. The error is raised when the ranges in progress have finished.

    Args:
        n_rows: number of rows.
        block_rows: maximum number of rows in a range.
        work: function to call for a range of rows; must be thread-safe.
        threads: number of threads; by default one per usable CPU.
    """
    ranges = [(start, min(start + block_rows, n_rows)) for start in range(0, n_rows, block_rows)]
    count = min(thread_count(threads), len(ranges))
    if count <= 1:
        for start, stop in ranges:
            work(start, stop)
        return
    remaining, lock, stopped = iter(ranges), threading.Lock(), threading.Event()

    def drain() -> None:
        while not stopped.is_set():
            with lock:
                next_range = next(remaining, None)
            if next_range is None:
                return
            try:
                work(*next_range)
            except BaseException:
                stopped.set()
                raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(drain) for _ in range(count)]
        try:
            for future in futures:
                future.result()
        finally:  # also after a KeyboardInterrupt in the waiting thread
            stopped.set()
