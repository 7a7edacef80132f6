"""Open files by descriptor, and read and write them at an offset, on systems with and without ``pread`` and its kin."""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

_CHUNK: Final = 16 << 20
"""Most bytes of one call of the fallbacks; Windows counts them in 32 bits."""
_OWN: Final = re.compile(r"/(?:dev|proc/(?:self|thread-self|\d+))/fd/(\d+)")
_MAX_LINKS: Final = 40
"""Links that are followed to find out what a path names, as in Linux."""
_moving = threading.Lock()
"""Held while a fallback moves the position of a file."""


def open_file(
    path: Path, *, write: bool = False, create: bool = False, new: bool = False, follow: bool = True, mode: int = 0o600
) -> int:
    """Open a file for reading, or for reading and writing; a FIFO does not block. Child processes do not inherit it.

    Args:
        path: path of the file.
        write: whether it is written, too.
        create: whether it is created if it is missing.
        new: whether it is an error if it exists.
        follow: whether a symbolic link at ``path`` is followed; otherwise it is an error.
        mode: permissions of a new file.

    Returns:
        The file descriptor.

    Raises:
        OSError: if it cannot be opened.
    """
    flags = (os.O_RDWR if write else os.O_RDONLY) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= (os.O_CREAT if create or new else 0) | (os.O_EXCL if new else 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
        _refuse_link(path)
    if not hasattr(os, "O_NONBLOCK"):
        _refuse_fifo(path)
    handle = os.open(path, flags, mode)
    try:
        if not follow:
            _refuse_link(path)
    except OSError:
        os.close(handle)
        raise
    return handle


def _refuse_link(path: Path) -> None:
    if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _refuse_fifo(path: Path) -> None:
    with suppress(FileNotFoundError):
        if stat.S_ISFIFO(path.stat().st_mode):
            raise OSError(errno.ENXIO, "Is a FIFO", str(path))


def open_folder(path: Path) -> int | None:
    """Open a directory to lock or to sync it; None where a directory cannot be opened, as on Windows.

    Raises:
        OSError: if it is no directory, or a symbolic link.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return None
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | getattr(os, "O_NOFOLLOW", 0))


def read_some(handle: int, buffer: memoryview, offset: int) -> int:
    """Read bytes at an offset into a buffer; return how many, 0 at the end of the file. Several threads may read."""
    if hasattr(os, "preadv"):
        return os.preadv(handle, [buffer], offset)
    if hasattr(os, "pread"):  # macOS before 11
        content = os.pread(handle, min(len(buffer), _CHUNK), offset)
    else:
        with _moving:
            before = os.lseek(handle, 0, os.SEEK_CUR)
            try:
                os.lseek(handle, offset, os.SEEK_SET)
                content = os.read(handle, min(len(buffer), _CHUNK))
            finally:
                os.lseek(handle, before, os.SEEK_SET)
    buffer[: len(content)] = content
    return len(content)


def write_some(handle: int, content: memoryview, offset: int) -> int:
    """Write bytes at an offset; return how many. Several threads may write."""
    if hasattr(os, "pwrite"):
        return os.pwrite(handle, content, offset)
    with _moving:
        before = os.lseek(handle, 0, os.SEEK_CUR)
        try:
            os.lseek(handle, offset, os.SEEK_SET)
            return os.write(handle, content[:_CHUNK])
        finally:
            os.lseek(handle, before, os.SEEK_SET)


def read_at(handle: int, count: int, offset: int) -> bytes:
    """Return ``count`` bytes at an offset, or those up to the end of the file."""
    content = bytearray(count)
    view, done = memoryview(content), 0
    while done < count and (n_read := read_some(handle, view[done:], offset + done)):
        done += n_read
    return bytes(view[:done])


def write_at(handle: int, content: bytes | memoryview, offset: int) -> None:
    """Write all bytes of a buffer at an offset."""
    view = memoryview(content).cast("B")
    while view:
        count = write_some(handle, view, offset)
        view, offset = view[count:], offset + count


def own_descriptor(path: Path) -> int | None:
    """Return the open file of this process that a path such as ``/dev/stdout`` names; None for other paths."""
    text = os.path.abspath(path)  # noqa: PTH100  (resolve would go on to the file behind the descriptor)
    own = {Path(folder).resolve() for folder in ("/proc/self/fd", "/dev/fd")}
    for _ in range(_MAX_LINKS):
        if found := _OWN.fullmatch(text):
            return int(found[1]) if Path(text).parent.resolve() in own else None
        try:
            text = os.path.normpath(os.path.join(os.path.dirname(text), os.readlink(text)))  # noqa: PTH115, PTH118, PTH120
        except OSError:
            return None
    return None
