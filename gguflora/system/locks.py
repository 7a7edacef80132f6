"""Exclusive locks on open files: ``flock`` where there is ``fcntl``, ``LockFileEx`` through ``msvcrt`` on Windows.

A lock ends when its file is closed, however its process ends. Some file systems have no locks.
"""

from __future__ import annotations

import errno
import os
import time
from typing import Any, Final

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:
    msvcrt = None  # type: ignore[assignment]

_BYTE: Final = 1 << 30
"""Offset of the byte that is locked on Windows, where others could not read a locked byte: behind what files hold that
are locked for their content. It need not exist."""
_HELD: Final = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}
_SECONDS: Final = 0.05


def try_lock(handle: int) -> bool:
    """Lock an open file unless another process, or another descriptor of this one, has locked it.

    Args:
        handle: file descriptor.

    Returns:
        Whether it is locked now; False if the system or the file system has no locks.

    Raises:
        BlockingIOError: if another one holds the lock.
    """
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            _lock_byte(msvcrt, handle)
        else:
            return False
    except OSError as error:
        if error.errno in _HELD:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked by another process") from error
        return False
    return True


def lock(handle: int) -> bool:
    """Wait for the lock of an open file; return False if there are no locks here."""
    while True:
        try:
            return try_lock(handle)
        except BlockingIOError:
            time.sleep(_SECONDS)


def _lock_byte(windows: Any, handle: int) -> None:  # noqa: ANN401  (a module that mypy knows on Windows only)
    before = os.lseek(handle, 0, os.SEEK_CUR)
    try:
        os.lseek(handle, _BYTE, os.SEEK_SET)
        windows.locking(handle, windows.LK_NBLCK, 1)
    finally:
        os.lseek(handle, before, os.SEEK_SET)
