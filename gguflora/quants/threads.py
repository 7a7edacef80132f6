"""Rows over threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from gguflora.system.cpus import thread_count


def run_rows(n_rows: int, block_rows: int, work: Callable[[int, int], None], threads: int | None) -> None:
    """Call ``work(start, stop)`` for ranges of at most ``block_rows`` rows on ``threads`` threads (default: all CPUs).

    After the first error no new range is begun; that error is raised once running ranges have ended.
    """
    ranges = [(start, min(start + block_rows, n_rows)) for start in range(0, n_rows, block_rows)]
    count = min(thread_count(threads), len(ranges))
    if count <= 1:
        for start, stop in ranges:
            work(start, stop)
        return
    left, lock, stopped = iter(ranges), threading.Lock(), threading.Event()

    def drain() -> None:
        while not stopped.is_set():
            with lock:
                piece = next(left, None)
            if piece is None:
                return
            try:
                work(*piece)
            except BaseException:
                stopped.set()
                raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(drain) for _ in range(count)]
        try:
            for future in futures:
                future.result()
        finally:  # an interrupt of the waiting thread, too
            stopped.set()
