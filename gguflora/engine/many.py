"""Submit more requests than a queue holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from gguflora.engine.requests import Generation, Request
from gguflora.errors import QueueFullError


def submit_all(
    submit: Callable[[Request, Callable[[bool], None]], Generation], requests: Sequence[Request]
) -> list[Generation]:
    """Submit requests in turn, and wait for one of them to end whenever the queue is full.

    Args:
        submit: submits a request; the function that it is given is called with True at the end.
        requests: the requests.

    Returns:
        The answers in the same order; the last of them may not have ended yet.

    Raises:
        QueueFullError: if the queue is full of requests of others.
    """
    ended = threading.Semaphore(0)
    generations: list[Generation] = []
    n_ended = 0
    for request in requests:
        while True:
            try:
                generations.append(submit(request, lambda is_end: ended.release() if is_end else None))
                break
            except QueueFullError:
                if n_ended == len(generations):  # others fill the queue
                    raise
                ended.acquire()
                n_ended += 1
    return generations
