"""How long a function takes."""

from __future__ import annotations

import time
from collections.abc import Callable


def thread_seconds(run: Callable[[], object], at_least: float) -> float:
    """Seconds of this thread (nobody else's) that a run takes, averaged over as many as fill `at_least`."""
    count, start = 0, time.thread_time()
    while True:
        run()
        count += 1
        passed = time.thread_time() - start
        if passed >= at_least:
            return passed / count
