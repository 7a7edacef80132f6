"""Copy a range of bytes between files, with ``copy_file_range`` where the system supports it."""

from __future__ import annotations

import errno
import os
from typing import Final

_BUFFER_BYTES: Final = 4 << 20
_UNSUPPORTED: Final = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
"""Errors with which ``copy_file_range`` refuses a pair of files that can still be copied through memory."""


def copy_range(source: int, source_offset: int, target: int, target_offset: int, count: int) -> None:
    """Copy ``count`` bytes without moving the files' positions.

    Args:
        source: file descriptor to read from.
        source_offset: offset of the first byte to read.
        target: file descriptor to write to.
        target_offset: offset of the first byte to write.
        count: number of bytes.

    Raises:
        EOFError: if the source ends early.
        OSError: if the target cannot be written.
    """
    while count:
        try:
            copied = os.copy_file_range(source, target, count, source_offset, target_offset)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            copied = _copy_through_memory(source, source_offset, target, target_offset, count)
        if copied == 0:
            raise EOFError(source_offset)
        source_offset, target_offset, count = source_offset + copied, target_offset + copied, count - copied


def _copy_through_memory(source: int, source_offset: int, target: int, target_offset: int, count: int) -> int:
    chunk = os.pread(source, min(count, _BUFFER_BYTES), source_offset)
    return os.pwrite(target, chunk, target_offset) if chunk else 0
