"""Read a pipe with a limit of time, also where the system cannot wait for pipes, as on Windows: a thread waits."""

from __future__ import annotations

import os
import threading
from queue import Empty, SimpleQueue
from typing import IO, Any, Final

_CHUNK: Final = 1 << 20


class PipeReader:
    """Reads a pipe in a thread of its own.

    Args:
        pipe: the pipe's end; nobody else may read it.
    """

    def __init__(self, pipe: IO[Any]) -> None:
        self._pipe = pipe
        self._parts: SimpleQueue[bytes] = SimpleQueue()
        self._thread = threading.Thread(target=self._follow, args=(pipe.fileno(),), daemon=True)
        self._thread.start()

    def _follow(self, handle: int) -> None:
        part = b"begun"
        while part:
            try:
                part = os.read(handle, _CHUNK)
            except OSError:
                part = b""
            self._parts.put(part)

    def read(self, seconds: float) -> bytes:
        """Return what has arrived, empty at the end of the pipe.

        Raises:
            TimeoutError: if nothing arrives in time.
        """
        try:
            part = self._parts.get(timeout=max(seconds, 0))
        except Empty as error:
            raise TimeoutError from error
        if not part:
            self._parts.put(part)  # the end stays the end
        return part

    def close(self) -> None:
        """Close the pipe. The process that writes to it must have ended."""
        self._thread.join()
        self._pipe.close()
