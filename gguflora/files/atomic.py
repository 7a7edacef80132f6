"""Output that is whole or absent: files without names in the target's directory, synced, then given their names."""

from __future__ import annotations

import errno
import fcntl
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

_LOG = logging.getLogger(__name__)
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
"""What file systems say that have no hard links."""


@contextmanager
def atomic_output(target: Path, *, force: bool = True) -> Iterator[IO[bytes]]:
    """A file that becomes ``target`` when the block ends, and leaves nothing behind when it fails.

    `path_of` says how to open it again.

    Args:
        target: name of the file.
        force: whether a file that has this name by then is replaced; else it is an error.

    Raises:
        OutputError: if it cannot be written.
    """
    with atomic_outputs([target], force=force) as (file,):
        yield file


@contextmanager
def atomic_outputs(targets: Sequence[Path], *, force: bool = True) -> Iterator[list[IO[bytes]]]:
    """Files that become ``targets``, all of one directory, when the block ends: all of them or none.

    Until then they have no names (O_TMPFILE), so that not even a killed process leaves one; where the file system has
    no such files they have temporary ones, which the next output of the same name removes. The first target gets its
    name last: a split model without its first file cannot be loaded.

    Raises:
        OutputError: if they cannot be written.
    """
    target = targets[0]
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
            f"{error.filename2 or target}: was made by someone else in the meantime; see to it"
        ) from error
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True)
class _Draft:
    """A file of the output before it has its name; ``beside`` is its temporary one, if it needs one."""

    target: Path
    file: IO[bytes]
    beside: Path
    is_named: bool

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        os.fchmod(self.file.fileno(), 0o666 & ~_umask())

    def link(self, path: Path) -> None:
        """Give it a name that is free."""
        if not self.is_named:
            _link(self.file.fileno(), path)
            return
        try:
            os.link(self.beside, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                raise FileExistsError(errno.EEXIST, "exists", str(self.beside), None, str(path)) from error
            self.beside.replace(path)


@contextmanager
def _draft(target: Path) -> Iterator[_Draft]:
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    handle, is_named = _open_beside(beside)
    try:
        with os.fdopen(handle, "w+b") as file:
            with suppress(OSError):  # not all file systems have locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield _Draft(target, file, beside, is_named)
    finally:
        beside.unlink(missing_ok=True)


def _publish(drafts: Sequence[_Draft], *, force: bool) -> None:
    named: list[Path] = []
    try:
        if force:
            for draft in drafts:
                if not draft.is_named:
                    draft.link(draft.beside)
            if len(drafts) > 1:  # the old first file with new others would be no model
                drafts[0].target.unlink(missing_ok=True)
        for draft in reversed(drafts):
            if force:
                draft.beside.replace(draft.target)
            else:
                draft.link(draft.target)
            named.append(draft.target)
    except BaseException:
        for path in named:
            path.unlink()
        raise


def _remove_litter(target: Path) -> None:
    """Remove temporary files of the target whose processes were killed: nobody holds their locks."""
    start = f".{target.name}."
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
def atomic_folder(target: Path) -> Iterator[Path]:
    """A directory that becomes ``target`` when the block ends, and leaves nothing behind when it fails.

    What a killed process leaves the next output of the same name removes.

    Raises:
        OutputError: if it cannot be written.
    """
    target = target.absolute()
    token = secrets.token_hex(4)  # process numbers are not enough: other machines may share the file system
    beside = target.with_name(f".{target.name}.{token}.partial")
    replaced = target.with_name(f".{target.name}.{token}.old.partial")
    try:
        _remove_litter(target)
        beside.mkdir()
        held = os.open(beside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # not all file systems have locks
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield beside
            for path in beside.iterdir():
                _sync_file(path)
            sync_folder(beside)
            if target.exists():
                target.replace(replaced)
            beside.replace(target)
        finally:
            os.close(held)
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)
        sync_folder(target.parent)
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


def sync_folder(folder: Path) -> None:
    """Make names in a directory last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
