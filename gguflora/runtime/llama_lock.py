"""Taking turns at one ``llama_cpp.Llama``, which can do one thing at a time and does not check."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from gguflora.errors import HotSwapError

_Item = TypeVar("_Item")


class _Session:
    """A call or a generation that has its turn: ``thread`` ran it last, ``running`` is whether it does now."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.running = False
        self.over = False


class LlamaLock:
    """Lets one call or one generation at a time use a Llama; those of other threads wait until it is over.

    A generation keeps its turn between tokens. If the thread that took its last token begins another call meanwhile,
    or has ended, the generation loses its turn and raises when it goes on.

    Attributes:
        lock: held while the Llama computes; whoever changes its adapters holds it, too.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._free = threading.Condition()
        self._session: _Session | None = None

    @contextmanager
    def call(self) -> Iterator[None]:
        """Hold the turn for the length of a ``with`` block. Blocks of one thread may be nested."""
        session = self._begin()
        try:
            with self._running(session), self.lock:
                yield
        finally:
            self._end(session)

    def generate(self, steps: Generator[_Item, Any, None]) -> Generator[_Item, Any, None]:
        """The items of ``steps``, computed while holding the turn.

        Raises:
            HotSwapError: if another call of the same thread has taken the turn between two items.
        """
        session, sent = self._begin(), None
        try:
            while True:
                with self._running(session), self.lock:
                    try:
                        item = steps.send(sent)
                    except StopIteration:
                        return
                sent = yield item
        finally:
            steps.close()
            self._end(session)

    def _begin(self) -> _Session | None:
        """A new session; None inside one that is running in this thread."""
        me = threading.current_thread()
        with self._free:
            while self._session is not None and self._session.thread is not me and self._session.thread.is_alive():
                self._free.wait(timeout=1)  # the thread may end without ending its session
            if self._session is not None:
                if self._session.thread is me and self._session.running:
                    return None
                self._session.over = True
            self._session = _Session()
            return self._session

    def _end(self, session: _Session | None) -> None:
        with self._free:
            if session is not None and self._session is session:
                self._session = None
                self._free.notify_all()

    @contextmanager
    def _running(self, session: _Session | None) -> Iterator[None]:
        if session is None:
            yield
            return
        with self._free:
            if session.over:
                raise HotSwapError(
                    "another call to this Llama has begun while tokens were still being generated; "
                    "take all tokens first, or use gguflora.engine for several generations at a time"
                )
            session.thread, session.running = threading.current_thread(), True
        try:
            yield
        finally:
            session.running = False
