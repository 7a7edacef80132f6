"""Output that is whole or absent: a temporary file beside the target, synced, then renamed over it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
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

    Raises:
        OutputError: if it cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(
            dir=target.parent, prefix=f".{target.name}.", suffix=".partial", delete=False
        ) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                Path(file.name).replace(target)
            except BaseException:
                with suppress(FileNotFoundError):
                    Path(file.name).unlink()
                raise
        _sync_folder(target.parent)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error


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
