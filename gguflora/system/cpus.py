"""The number of CPUs and threads to use."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """Return the number of CPUs this process may run on, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def thread_count(threads: int | None) -> int:
    """Return ``threads``, or one thread per usable CPU if it is None or 0."""
    return threads or usable_cpus()
