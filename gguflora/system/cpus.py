"""The processors that this process may use."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """How many processors this process may run on, of all that the machine has."""
    return len(os.sched_getaffinity(0))


def thread_count(threads: int | None) -> int:
    """The number of threads to use: as many as asked for, by default one for each usable processor."""
    return threads or usable_cpus()
