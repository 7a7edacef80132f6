"""Atomic output: write to unnamed or temporary files in the target's directory, sync them, then give them their names.

A reader sees either the complete output or none of it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gguflora.errors import OutputError
from gguflora.files.output_rule import check_regular

_LOG = logging.getLogger(__name__)
_MAX_NAME = 255
"""Longest name of a file in bytes (NAME_MAX of Linux's file systems)."""
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
"""Errors with which file systems without hard links refuse ``link``."""


@contextmanager
def atomic_output(target: Path, *, force: bool = True) -> Iterator[IO[bytes]]:
    """Open a file that becomes ``target`` when the block ends, and is discarded if the block raises.

    `path_of` gives a path for opening it a second time.

    Args:
        target: path of the file.
        force: whether to replace a file that exists at ``target`` when the block ends; otherwise it is an error.

    Raises:
        OutputError: if the file cannot be written, or a device, FIFO, socket or link is in its place.
    """
    with atomic_outputs([target], force=force) as (file,):
        yield file


@contextmanager
def atomic_outputs(targets: Sequence[Path], *, force: bool = True) -> Iterator[list[IO[bytes]]]:
    """Open files that become ``targets`` when the block ends: all of them or none.

    Until then the files have no names (O_TMPFILE), so a killed process leaves nothing behind. Where the file system
    does not support that, they have temporary names, and the next output with the same target removes leftovers. The
    first target gets its name last, because a split model without its first file cannot be loaded.

    Args:
        targets: paths of the files, all in one directory.
        force: whether to replace files that exist when the block ends; otherwise they are an error.

    Raises:
        OutputError: if the files cannot be written, or a device, FIFO, socket or link is in their place.
    """
    target = targets[0]
    for path in targets:
        check_regular(path)
    try:
        for path in targets:
            _remove_litter(path)
        with ExitStack() as stack:
            drafts = [stack.enter_context(_draft(path)) for path in targets]
            yield [draft.file for draft in drafts]
            for draft in drafts:
                draft.finish()
            _publish(drafts, force=force)
        sync_folder(target.parent)
        _LOG.debug("wrote %s", ", ".join(map(str, targets)))
    except FileExistsError as error:
        raise OutputError(
            f"{error.filename2 or target}: another process created it in the meantime; choose another name, or remove "
            "it and try again"
        ) from error
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True)
class _Draft:
    """An output file that does not have its final name yet.

    Attributes:
        target: the final path.
        file: the open file.
        temporary: temporary path in the same directory.
        is_named: whether the file has the temporary name; otherwise it has no name.
    """

    target: Path
    file: IO[bytes]
    temporary: Path
    is_named: bool

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        os.fchmod(self.file.fileno(), 0o666 & ~_umask())

    def link(self, path: Path) -> None:
        """Give the file a name that is not taken.

        Raises:
            FileExistsError: if the name is taken.
        """
        if not self.is_named:
            _link(self.file.fileno(), path)
            return
        try:
            os.link(self.temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                raise FileExistsError(errno.EEXIST, "exists", str(self.temporary), None, str(path)) from error
            self.temporary.replace(path)


@contextmanager
def _draft(target: Path) -> Iterator[_Draft]:
    temporary = _new_draft(target)
    handle, is_named = _open_temporary(temporary)
    try:
        with os.fdopen(handle, "w+b") as file:
            with suppress(OSError):  # not all file systems support locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield _Draft(target, file, temporary, is_named)
    finally:
        temporary.unlink(missing_ok=True)


def _new_draft(target: Path) -> Path:
    """Return a new name for a draft; a process id is not unique, because other machines may share the file system."""
    return target.with_name(f"{_draft_start(target)}{secrets.token_hex(4)}.partial")


def _draft_start(target: Path) -> str:
    """Return how the names of a target's drafts begin; a long name is shortened to what file systems allow."""
    name = target.name
    if len(os.fsencode(name)) > _MAX_NAME - len("..01234567.partial"):
        name = f"{name[:16]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}"
    return f".{name}."


def _publish(drafts: Sequence[_Draft], *, force: bool) -> None:
    published: list[Path] = []
    try:
        if force:
            for draft in drafts:
                if not draft.is_named:
                    draft.link(draft.temporary)
            if len(drafts) > 1:  # an old first file must never stand beside new other files
                drafts[0].target.unlink(missing_ok=True)
        for draft in reversed(drafts):
            if force:
                draft.temporary.replace(draft.target)
            else:
                draft.link(draft.target)
            published.append(draft.target)
    except BaseException:
        for path in published:
            path.unlink()
        raise


def _remove_litter(target: Path) -> None:
    """Remove temporary files that killed processes left for this target: those that no process holds a lock on."""
    start = _draft_start(target)
    with os.scandir(target.parent) as entries:
        litter = [Path(e.path) for e in entries if e.name.startswith(start) and e.name.endswith(".partial")]
    for path in litter:
        with suppress(OSError):
            is_folder = path.is_dir() and not path.is_symlink()
            mode = os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR
            handle = os.open(path, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_folder:
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(handle)


@contextmanager
def atomic_folder(target: Path, *, marker: str | None = None, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Make a directory whose files become those of ``target`` when the block ends, and vanish if the block raises.

    A new or empty ``target`` appears at once, as a whole. In one that holds files, only the files that the block wrote
    and those that match ``stale`` are replaced; everything else stays. Meanwhile the marker is missing, so that no
    reader takes old files and new ones for one adapter.

    If the process is killed, the next output with the same target removes the leftovers.

    Args:
        target: path of the directory.
        marker: name of the file that makes the directory readable; it is removed first and written last.
        stale: patterns of file names that belong to the former output.

    Raises:
        OutputError: if the directory cannot be written.
    """
    target = target.absolute()
    check_regular(target)
    temporary = _new_draft(target)
    try:
        _remove_litter(target)
        temporary.mkdir()
        handle = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # not all file systems support locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary
            for path in temporary.iterdir():
                _sync_file(path)
            sync_folder(temporary)
            try:
                temporary.replace(target)  # works if the target is missing or an empty directory
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                    raise
                _replace_files(temporary, target, marker, stale)
        finally:
            os.close(handle)
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(target.parent)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error


def _replace_files(draft: Path, target: Path, marker: str | None, stale: Sequence[str]) -> None:
    """Move the files of ``draft`` to ``target``, the marker last, and remove the former output's other files."""
    names = sorted((path.name for path in draft.iterdir()), key=lambda name: name == marker)
    for name in names:
        if (target / name).is_dir():
            raise OutputError(f"{target / name}: is a directory, expected a file; remove it, or choose another output")
    old = {path.name for pattern in stale for path in target.glob(pattern) if path.is_symlink() or path.is_file()}
    for name in ([marker] if marker else []) + sorted(old - set(names)):
        (target / name).unlink(missing_ok=True)
    sync_folder(target)
    for name in names:
        (draft / name).replace(target / name)
    sync_folder(target)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def path_of(file: IO[bytes]) -> Path:
    """Return a path with which this process can open the file, even if the file has no name."""
    return Path(f"/proc/self/fd/{file.fileno()}")


def _open_temporary(path: Path) -> tuple[int, bool]:
    """Open a new unnamed file in the directory of ``path``, or else one named ``path``; say whether it is named."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(path.parent, flags | os.O_TMPFILE, 0o600), False
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}:
            raise
    return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True


def _link(handle: int, path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:  # only with src_dir_fd does os.link follow the symbolic link in /proc (linkat, AT_SYMLINK_FOLLOW)
        os.link(f"/proc/self/fd/{handle}", path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Sync a directory, so that its entries survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
