"""A lock around one ``llama_cpp.Llama``, which can do only one thing at a time and does not check that itself."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from gguflora.errors import HotSwapError

_Item = TypeVar("_Item")


class _Session:
    """A call or a generation that holds the lock.

    Attributes:
        thread: the thread that ran it last.
        running: whether that thread is running it now.
        over: whether another call has taken the lock from it.
    """

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.running = False
        self.over = False


class LlamaLock:
    """Lets one call or one generation use a Llama; calls of other threads wait until it is over.

    A generation holds the lock between tokens, too. If the thread that took its last token starts another call or has
    ended, the generation loses the lock and raises when it continues.

    Attributes:
        lock: held while the Llama computes and while its adapters change.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._free = threading.Condition()
        self._session: _Session | None = None

    @contextmanager
    def call(self) -> Iterator[None]:
        """Hold the lock for the length of a ``with`` block. Blocks of one thread may be nested."""
        session = self._begin()
        try:
            with self._running(session), self.lock:
                yield
        finally:
            self._end(session)

    def generate(self, steps: Generator[_Item, Any, None]) -> Generator[_Item, Any, None]:
        """Yield the items of ``steps``, computed while the lock is held.

        Raises:
            HotSwapError: if another call of the same thread has taken the lock between two items.
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
        """Start a session; return None inside a session that this thread is already running."""
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
                    "another call to this Llama started while tokens were still being generated; "
                    "finish the generation first, or use gguflora.engine for several generations at once"
                )
            session.thread, session.running = threading.current_thread(), True
        try:
            yield
        finally:
            session.running = False
