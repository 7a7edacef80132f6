"""Atomic output: write to unnamed or temporary files in the target's directory, sync them, then give them their names.

A reader sees either the complete output or none of it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gguflora.errors import OutputError
from gguflora.files.output_rule import check_regular
from gguflora.system import storage
from gguflora.system.descriptors import open_file, open_folder
from gguflora.system.locks import try_lock
from gguflora.system.nameless import give_name, open_nameless
from gguflora.system.storage import copy_range, link, replace, set_permissions, sync_file, sync_folder

_LOG = logging.getLogger(__name__)
_MAX_NAME = 255
"""Longest name of a file in bytes (NAME_MAX of Linux's file systems)."""
_ABANDONED = 86400.0
"""Seconds after which a draft that nobody has touched is taken for a leftover where files cannot be locked."""
_CLOSED = 60.0
"""Seconds for which a draft may be closed, and so not locked, before it is renamed (`RENAMES_OPEN_FILES`)."""


@contextmanager
def atomic_output(target: Path, *, force: bool = True) -> Iterator[IO[bytes]]:
    """Open a file that becomes ``target`` when the block ends, and is discarded if the block raises.

    `gguflora.system.nameless.path_of` gives a path for opening it a second time.

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
        sync_file(self.file.fileno())
        set_permissions(self.file.fileno(), self.temporary, 0o666 & ~_umask())
        if self.is_named and not storage.RENAMES_OPEN_FILES:
            self.file.close()

    def link(self, path: Path) -> None:
        """Give the file a name that is not taken.

        Raises:
            FileExistsError: if the name is taken.
        """
        if not self.is_named:
            if give_name(self.file.fileno(), path):
                return
            _copy(self.file.fileno(), self.temporary)
        if path != self.temporary and not link(self.temporary, path):
            if path.exists():
                raise FileExistsError(errno.EEXIST, "exists", str(self.temporary), None, str(path))
            replace(self.temporary, path)


@contextmanager
def _draft(target: Path) -> Iterator[_Draft]:
    temporary = _new_draft(target)
    handle, is_named = _open_temporary(temporary)
    try:
        name = temporary if is_named else handle
        with open(name, "w+b", opener=lambda *_: handle) as file:  # so the file knows its name
            with suppress(BlockingIOError):  # of one that looks for leftovers
                try_lock(handle)
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
                replace(draft.temporary, draft.target)
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
    litter: list[Path] = []
    with suppress(PermissionError), os.scandir(target.parent) as entries:  # one may write to it, but not list it
        litter = [Path(e.path) for e in entries if e.name.startswith(start) and e.name.endswith(".partial")]
    for path in litter:
        with suppress(OSError):  # others look for leftovers, too
            is_folder = path.is_dir() and not path.is_symlink()
            if _is_abandoned(path, is_folder=is_folder):
                shutil.rmtree(path) if is_folder else path.unlink()


def _is_abandoned(path: Path, *, is_folder: bool) -> bool:
    """Whether no process holds the lock of a draft; where there are no locks, whether it is old.

    Raises:
        OSError: if a process holds its lock.
    """
    newest = max(each.lstat().st_mtime for each in ([path, *path.iterdir()] if is_folder else [path]))
    age = time.time() - newest
    handle = open_folder(path) if is_folder else open_file(path, write=True, follow=False)
    if handle is None:
        return age > _ABANDONED
    try:
        return age > (_wait_for_rename() if try_lock(handle) else _ABANDONED)
    finally:
        os.close(handle)


def _wait_for_rename() -> float:
    return -math.inf if storage.RENAMES_OPEN_FILES else _CLOSED


@contextmanager
def atomic_folder(
    target: Path, *, marker: str | None = None, stale: Sequence[str] = (), force: bool = True
) -> Iterator[Path]:
    """Make a directory whose files become those of ``target`` when the block ends, and vanish if the block raises.

    A new or empty ``target`` appears at once, as a whole. In one that holds files, only the files that the block wrote
    and those that match ``stale`` are replaced; everything else stays. Meanwhile the marker is missing, so that no
    reader takes old files and new ones for one adapter.

    If the process is killed, the next output with the same target removes the leftovers.

    Args:
        target: path of the directory.
        marker: name of the file that makes the directory readable; it is removed first and written last.
        stale: patterns of file names that belong to the former output.
        force: whether to replace files of a directory that holds some when the block ends; otherwise it is an error.

    Raises:
        OutputError: if the directory cannot be written.
    """
    target = target.absolute()
    check_regular(target)
    temporary = _new_draft(target)
    try:
        _remove_litter(target)
        temporary.mkdir()
        handle = open_folder(temporary)
        try:
            if handle is not None:
                with suppress(BlockingIOError):  # of one that looks for leftovers
                    try_lock(handle)
            yield temporary
            for path in temporary.iterdir():
                _sync_file(path)
            sync_folder(temporary)
            try:
                temporary.replace(target)  # works if the target is missing, or an empty directory except on Windows
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST} and not target.is_dir():
                    raise
                if not force and any(target.iterdir()):
                    raise OutputError(f"{target}: another process created it in the meantime") from error
                _replace_files(temporary, target, marker, stale)
        finally:
            if handle is not None:
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
        replace(draft / name, target / name)
    sync_folder(target)


def _sync_file(path: Path) -> None:
    handle = open_file(path, write=True)  # Windows syncs only what is open for writing
    try:
        sync_file(handle)
    finally:
        os.close(handle)


def _open_temporary(path: Path) -> tuple[int, bool]:
    """Open a new unnamed file in the directory of ``path``, or else one named ``path``; say whether it is named."""
    handle = open_nameless(path.parent)
    return (handle, False) if handle is not None else (open_file(path, write=True, new=True), True)


def _copy(source: int, path: Path) -> None:
    """Copy a file that cannot be given a name into a new one."""
    handle = open_file(path, write=True, new=True)
    try:
        copy_range(source, 0, handle, 0, os.fstat(source).st_size)
        sync_file(handle)
        set_permissions(handle, path, 0o666 & ~_umask())
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
