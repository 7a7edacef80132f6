"""A limit on what several threads use together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedBudget:
    """An amount that threads take parts of; who asks for more than is left waits.

    Args:
        amount: all there is. Who asks for more than that gets it when nobody else has any.
    """

    def __init__(self, amount: int) -> None:
        self._amount, self._used = amount, 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, part: int) -> Iterator[None]:
        """Have a part of it as long as the context lasts."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + part <= self._amount)
            self._used += part
        try:
            yield
        finally:
            with self._changed:
                self._used -= part
                self._changed.notify_all()
