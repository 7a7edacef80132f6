"""Output that is whole or absent: a file without a name in the target's directory, synced, then given its name."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gguflora.errors import OutputError


def check_target(target: Path, inputs: Iterable[Path], *, force: bool, size: int) -> None:
    """Check, before any work, that ``size`` bytes can be written to ``target``.

    Raises:
        OutputError: if it exists and ``force`` is not set, is one of the inputs, or its directory is missing, not
            writable or too full.
    """
    folder = target.parent
    if not folder.is_dir():
        raise OutputError(f"{target}: the directory {folder} does not exist; create it first")
    if target.is_dir():
        raise OutputError(f"{target}: is a directory, expected the name of a file")
    if target.exists():
        for source in inputs:
            if source.exists() and source.samefile(target):
                raise OutputError(f"{target}: is also an input; choose another name for the output")
        if not force:
            raise OutputError(f"{target}: already exists; choose another name, or overwrite it with --force")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: the directory {folder} is not writable")
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OutputError(f"{target}: needs {size:,} bytes, but only {free:,} are free on its disk")


@contextmanager
def atomic_output(target: Path) -> Iterator[IO[bytes]]:
    """A file that becomes ``target`` when the block ends, and leaves nothing behind when it fails.

    Until then it has no name (O_TMPFILE), so that not even a killed process leaves one; where the file system has no
    such files it has a temporary one. `path_of` says how to open it again.

    Raises:
        OutputError: if it cannot be written.
    """
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        handle, is_named = _open_beside(beside)
        try:
            with os.fdopen(handle, "w+b") as file:
                yield file
                file.flush()
                os.fsync(handle)
                os.fchmod(handle, 0o666 & ~_umask())
                if not is_named:
                    _link(handle, beside)
                beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
        _sync_folder(target.parent)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error


def check_folder_target(target: Path, inputs: Iterable[Path], *, marker: str, force: bool) -> None:
    """Check, before any work, that a directory can be written at ``target``.

    Args:
        target: the directory.
        inputs: what must not be overwritten.
        marker: name of a file that every directory of this kind holds: others are never overwritten.
        force: whether one of this kind may be.

    Raises:
        OutputError: if it cannot.
    """
    parent = target.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{target}: the directory {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: the directory {parent} is not writable")
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file()):
        raise OutputError(f"{target}: exists and is no directory with {marker}; choose another name")
    for source in inputs:
        if source.exists() and (source.samefile(target) or source.parent.samefile(target)):
            raise OutputError(f"{target}: is also an input; choose another name for the output")
    if any(target.iterdir()) and not force:
        raise OutputError(f"{target}: already exists; choose another name, or overwrite it with --force")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A directory that becomes ``target`` when the block ends, and leaves nothing behind when it fails.

    Raises:
        OutputError: if it cannot be written.
    """
    target = target.absolute()
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        beside.mkdir()
        try:
            yield beside
            for path in beside.iterdir():
                _sync_file(path)
            _sync_folder(beside)
            if target.exists():
                target.replace(replaced)
            beside.replace(target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)
        _sync_folder(target.parent)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def path_of(file: IO[bytes]) -> Path:
    """A path under which this process can open the file, named or not."""
    return Path(f"/proc/self/fd/{file.fileno()}")


def _open_beside(beside: Path) -> tuple[int, bool]:
    """A new file in the same directory, and whether it has a name."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(beside.parent, flags | os.O_TMPFILE, 0o600), False
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}:
            raise
    return os.open(beside, flags | os.O_CREAT | os.O_EXCL, 0o600), True


def _link(handle: int, path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:  # with a directory given, os.link follows the symbolic link in /proc (linkat, AT_SYMLINK_FOLLOW)
        os.link(f"/proc/self/fd/{handle}", path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
