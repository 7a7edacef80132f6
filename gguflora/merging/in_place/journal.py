"""The model that is changed in place, and the journal that makes its changes safe."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np

from gguflora.errors import OutputError
from gguflora.files.atomic import sync_folder
from gguflora.files.sidecars import journal_path, undo_path
from gguflora.merging.patch.chain import Chain, read, write
from gguflora.merging.patch.format import MAX_LENGTH
from gguflora.quants.arrays import Bytes

CHUNK_BYTES: Final = 16 << 20
"""What is changed between two syncs, give or take a record."""

_PREAMBLE: Final = struct.Struct("<8sQ32s")
_MAGIC: Final = b"gfl undo"
_PLACE: Final = np.dtype([("offset", "<u8"), ("length", "<u8")])

Change = tuple[int, Bytes, Bytes]
"""Where bytes lie, what they are, and what they shall be."""


@dataclass(frozen=True, slots=True)
class JournalModel:
    """A locked model that can be written.

    Attributes:
        path: of its (first) file itself, symbolic links followed.
        files: its files.
    """

    path: Path
    files: Chain

    @property
    def undo(self) -> Path:
        """The undo file."""
        return undo_path(self.path)


@contextmanager
def locked(paths: Sequence[Path]) -> Iterator[JournalModel]:
    """A model that nobody else merges into or unmerges meanwhile.

    Raises:
        OutputError: if somebody does, or a file cannot be written.
    """
    with ExitStack() as stack:
        handles = []
        for path in paths:
            handles.append(_open(path))
            stack.callback(os.close, handles[-1])
            _lock(path, handles[-1])
        yield JournalModel(paths[0].resolve(), Chain(handles, [os.fstat(handle).st_size for handle in handles]))


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise OutputError(f"{path}: cannot be changed in place: {error.strerror}") from error


def _lock(path: Path, handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"{path}: is being merged into or unmerged by another process; wait for it") from error
    except OSError:  # not all file systems have locks
        return


class Journal:
    """Present bytes of the chunk of a model that is being changed.

    Args:
        model: the model.
        owner: SHA-256 of the base, in hexadecimal: a journal of another is not taken for this one's.
    """

    def __init__(self, model: JournalModel, owner: str) -> None:
        self._model, self._owner = model, owner
        self._path = journal_path(model.path)

    def change(self, changes: Iterable[Change]) -> None:
        """Change the model, such that it can be repaired whenever this is stopped; no changes need no journal."""
        chunks = _chunks(changes)
        first = next(chunks, None)
        if first is None:
            return
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(handle, 0, CHUNK_BYTES + 2 * MAX_LENGTH)  # a full disk is noticed now or never
            sync_folder(self._path.parent)
            for chunk in chain([first], chunks):
                self._keep(handle, chunk)
                for offset, _, after in chunk:
                    self._model.files.write(after, offset)
                self._model.files.sync()
        finally:
            os.close(handle)

    def _keep(self, handle: int, chunk: list[Change]) -> None:
        places = np.array([(offset, len(before)) for offset, before, _ in chunk], _PLACE)
        content = np.concatenate([places.view(np.uint8), *(before for _, before, _ in chunk)])
        start = _PREAMBLE.pack(_MAGIC, len(chunk), self._digest(content))
        write(handle, np.frombuffer(start, np.uint8), 0)
        write(handle, content, len(start))
        os.fsync(handle)

    def kept(self) -> dict[int, Bytes]:
        """Bytes of the chunk that was being changed, by offset; none if no chunk was begun."""
        try:
            handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return {}
        try:
            return self._parse(read(handle, 0, min(os.fstat(handle).st_size, 2 * CHUNK_BYTES)))
        finally:
            os.close(handle)

    def _parse(self, journal: Bytes) -> dict[int, Bytes]:
        if len(journal) < _PREAMBLE.size:
            return {}
        magic, count, digest = _PREAMBLE.unpack_from(journal.data)
        content, n_places = journal[_PREAMBLE.size :], count * _PLACE.itemsize
        if magic != _MAGIC or n_places > len(content):
            return {}
        places = np.frombuffer(content[:n_places].tobytes(), _PLACE).tolist()
        end = n_places + sum(length for _, length in places)
        if end > len(content) or self._digest(content[:end]) != digest:
            return {}
        kept, at = {}, n_places
        for offset, length in places:
            kept[offset] = content[at : at + length]
            at += length
        return kept

    def _digest(self, content: Bytes) -> bytes:
        digest = hashlib.sha256(self._owner.encode())
        digest.update(content.data)
        return digest.digest()

    def remove(self) -> None:
        """Remove the journal; the model is synced."""
        self._path.unlink(missing_ok=True)
        sync_folder(self._path.parent)


def _chunks(changes: Iterable[Change]) -> Iterator[list[Change]]:
    chunk: list[Change] = []
    size = 0
    for change in changes:
        chunk.append(change)
        size += len(change[1])
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
