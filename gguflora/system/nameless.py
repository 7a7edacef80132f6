"""Files that have no name, so that a killed process leaves nothing behind: on disk (``O_TMPFILE``) and in memory."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

_DESCRIPTORS: Final = Path("/proc/self/fd")
_NO_TMPFILE: Final = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS, errno.EPERM}
"""Errors with which kernels and file systems say that they have no nameless files."""


def open_nameless(folder: Path) -> int | None:
    """Open a new file without a name in a directory for reading and writing; None where that cannot be done.

    Raises:
        OSError: if no file can be created there.
    """
    if not hasattr(os, "O_TMPFILE") or not _DESCRIPTORS.is_dir():  # without /proc it would never get a name
        return None
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    return None


def give_name(handle: int, path: Path) -> bool:
    """Give a nameless file a name that is not taken; return False if this file system cannot, as some overlays.

    Raises:
        FileExistsError: if the name is taken.
        OSError: if the directory cannot be written.
    """
    folder = os.open(path.parent, os.O_RDONLY)
    try:  # only with src_dir_fd does os.link follow the symbolic link in /proc (linkat, AT_SYMLINK_FOLLOW)
        os.link(_DESCRIPTORS / str(handle), path, src_dir_fd=folder, follow_symlinks=True)
    except OSError as error:
        if error.errno not in _NO_TMPFILE | {errno.EXDEV, errno.EACCES}:
            raise
        return False
    finally:
        os.close(folder)
    return True


def path_of(file: IO[bytes]) -> Path:
    """Return a path with which this process can open an open file once more, even if the file has no name."""
    return _DESCRIPTORS / str(file.fileno()) if isinstance(file.name, int) else Path(file.name)


@contextmanager
def memory_file(name: str) -> Iterator[Path]:
    """Create a file in memory, else a temporary one, and yield its path, valid in this process until the context ends.

    Args:
        name: what it is for, as the system's tools show it.
    """
    if hasattr(os, "memfd_create") and _DESCRIPTORS.is_dir():
        with suppress(OSError):  # a sandbox may forbid it
            handle = os.memfd_create(name)
            try:
                yield _DESCRIPTORS / str(handle)
            finally:
                os.close(handle)
            return
    with tempfile.TemporaryDirectory(prefix="gguflora-", ignore_cleanup_errors=True) as folder:
        yield Path(folder) / name
