"""What makes output last: syncing, reserving space, renaming, copying, links, permissions. File systems differ, too."""

from __future__ import annotations

import errno
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from gguflora.system.descriptors import open_folder, read_at, write_at

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RENAMES_OPEN_FILES: bool = os.name != "nt"
"""Whether a file that this process has open can be renamed or replaced."""
_UNSUPPORTED: Final = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY}
"""Errors with which a file system says that it does not know a call."""
_NO_LINKS: Final = _UNSUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV, errno.ENOENT}
_NOT_COPIED: Final = _UNSUPPORTED | {errno.EXDEV, errno.EPERM, errno.EACCES, errno.ETXTBSY, errno.EBADF, errno.EISDIR}
"""Errors with which ``copy_file_range`` refuses files that can still be copied through memory."""
_BUFFER_BYTES: Final = 4 << 20
_PAUSES: Final = (0.01, 0.05, 0.2, 0.5)
"""Seconds between attempts to rename on Windows, where a virus scanner may have the file open for a moment."""


def sync_file(handle: int) -> None:
    """Wait until an open file is on the disk; on macOS until it left the disk's own cache, too."""
    if (full := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
        with suppress(OSError):  # not on network shares
            fcntl.fcntl(handle, full)
            return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def sync_folder(folder: Path) -> None:
    """Sync a directory, so that its entries survive a power failure, where the system can do that."""
    try:
        handle = open_folder(folder.resolve())
    except PermissionError:  # a directory in which one may write but not read
        return
    if handle is None:
        return
    try:
        sync_file(handle)
    finally:
        os.close(handle)


def reserve(handle: int, size: int) -> None:
    """Make sure that a file can grow to ``size`` bytes without the disk being full; its content stays.

    Raises:
        OSError: if there is not so much space.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        else:
            return
    for start in range(os.fstat(handle).st_size, size, _BUFFER_BYTES):
        write_at(handle, bytes(min(_BUFFER_BYTES, size - start)), start)


def set_permissions(handle: int, path: Path, mode: int) -> None:
    """Set the permissions of an open file, where the file system has permissions and lets its owner set them.

    Args:
        handle: file descriptor.
        path: path of the file, for systems that set them by name only.
        mode: the permissions.
    """
    with suppress(OSError):
        if hasattr(os, "fchmod"):
            os.fchmod(handle, mode)
        else:
            path.chmod(mode)


def replace(source: Path, target: Path) -> None:
    """Rename a file; one of the same name gives way. On Windows neither may be open.

    Raises:
        OSError: if it cannot be renamed.
    """
    for pause in _PAUSES:
        try:
            source.replace(target)
        except PermissionError:
            if RENAMES_OPEN_FILES:
                raise
            time.sleep(pause)
        else:
            return
    try:
        source.replace(target)
    except PermissionError as error:
        raise PermissionError(error.errno, "another program has it open, or it is read-only", str(target)) from error


def link(source: Path, target: Path) -> bool:
    """Give a file a second name; return False where that cannot be done.

    Raises:
        FileExistsError: if the name is taken.
        OSError: if the directory cannot be written.
    """
    if not hasattr(os, "link"):
        return False
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def point(target: Path, source: Path) -> None:
    """Make ``target`` show the content of ``source``: a symbolic link, else a hard link, else a copy.

    Windows lets few users make symbolic links, and exFAT has none.
    """
    try:
        target.symlink_to(source)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):
        if not link(source, target):
            shutil.copyfile(source, target)


def copy_range(source: int, source_offset: int, target: int, target_offset: int, count: int) -> None:
    """Copy ``count`` bytes without moving the files' positions; ``copy_file_range`` shares blocks where it can.

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
        copied = _copy_some(source, source_offset, target, target_offset, count)
        if copied == 0:
            raise EOFError(source_offset)
        source_offset, target_offset, count = source_offset + copied, target_offset + copied, count - copied


def _copy_some(source: int, source_offset: int, target: int, target_offset: int, count: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            if copied := os.copy_file_range(source, target, count, source_offset, target_offset):
                return copied  # some kernels copy nothing of files in /proc and on FUSE: see whether there is more
        except OSError as error:
            if error.errno not in _NOT_COPIED:
                raise
    chunk = read_at(source, min(count, _BUFFER_BYTES), source_offset)
    write_at(target, chunk, target_offset)
    return len(chunk)
