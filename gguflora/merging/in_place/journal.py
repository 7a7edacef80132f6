"""Lock a model that is changed in place, and journal its changes so that they can be undone after a crash."""

from __future__ import annotations

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
from gguflora.files.output_rule import check_regular
from gguflora.files.sidecars import journal_path, undo_path
from gguflora.merging.patch.chain import Chain, read, write
from gguflora.merging.patch.format import MAX_LENGTH
from gguflora.quants.arrays import Bytes
from gguflora.system.descriptors import open_file
from gguflora.system.locks import try_lock
from gguflora.system.storage import reserve, sync_file, sync_folder

CHUNK_BYTES: Final = 16 << 20
"""Bytes that are changed between two syncs, up to one record more."""

_PREAMBLE: Final = struct.Struct("<8sQ32s")
_MAGIC: Final = b"gfl undo"
_PLACE: Final = np.dtype([("offset", "<u8"), ("length", "<u8")])

Change = tuple[int, Bytes, Bytes]
"""Offset, old bytes and new bytes."""


@dataclass(frozen=True, slots=True)
class JournalModel:
    """A locked model, open for writing.

    Attributes:
        path: path of its (first) file, with symbolic links resolved.
        files: its files.
    """

    path: Path
    files: Chain

    @property
    def undo(self) -> Path:
        """Path of the undo file."""
        return undo_path(self.path)


@contextmanager
def locked(paths: Sequence[Path]) -> Iterator[JournalModel]:
    """Open a model for writing and lock it against other merges and unmerges.

    Raises:
        OutputError: if another process has locked it, a file cannot be written, or one of several files is a link to
            another folder: a cloned model must not lead to files of the user.
    """
    folder = paths[0].resolve().parent
    for path in paths:
        if path.resolve().parent != folder:
            raise OutputError(f"{path}: is a link out of {folder}, where the model's first file is; copy it there")
    with ExitStack() as stack:
        handles = []
        for path in paths:
            handles.append(_open(path))
            stack.callback(os.close, handles[-1])
            _lock(path, handles[-1])
        yield JournalModel(paths[0].resolve(), Chain(handles, [os.fstat(handle).st_size for handle in handles]))


def _open(path: Path) -> int:
    try:
        return open_file(path, write=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be changed in place: {error.strerror}") from error


def _lock(path: Path, handle: int) -> None:
    try:
        try_lock(handle)  # not all file systems have locks
    except BlockingIOError as error:
        raise OutputError(f"{path}: is being merged into or unmerged by another process; wait for it") from error


class Journal:
    """Holds the old bytes of the chunk of a model that is being changed.

    Args:
        model: the model.
        owner: SHA-256 of the base, in hexadecimal; it keeps the journal of another base from being used.
    """

    def __init__(self, model: JournalModel, owner: str) -> None:
        self._model, self._owner = model, owner
        self._path = journal_path(model.path)

    def change(self, changes: Iterable[Change]) -> None:
        """Change the model so that it can be restored after an interruption at any time. No changes need no journal."""
        chunks = _chunks(changes)
        first = next(chunks, None)
        if first is None:
            return
        check_regular(self._path)
        handle = open_file(self._path, write=True, create=True, follow=False)
        try:
            reserve(handle, CHUNK_BYTES + 2 * MAX_LENGTH)  # fail now if the disk is full, not midway
            sync_folder(self._path.parent)
            for chunk in chain([first], chunks):
                self._save(handle, chunk)
                for offset, _, after in chunk:
                    self._model.files.write(after, offset)
                self._model.files.sync()
        finally:
            os.close(handle)

    def _save(self, handle: int, chunk: list[Change]) -> None:
        places = np.array([(offset, len(before)) for offset, before, _ in chunk], _PLACE)
        content = np.concatenate([places.view(np.uint8), *(before for _, before, _ in chunk)])
        start = _PREAMBLE.pack(_MAGIC, len(chunk), self._digest(content))
        write(handle, np.frombuffer(start, np.uint8), 0)
        write(handle, content, len(start))
        sync_file(handle)

    def read_saved(self) -> dict[int, Bytes]:
        """Return the saved bytes of the chunk that was being changed, by offset; none if no change had begun."""
        check_regular(self._path)
        try:
            handle = open_file(self._path, follow=False)
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
        saved, position = {}, n_places
        for offset, length in places:
            saved[offset] = content[position : position + length]
            position += length
        return saved

    def _digest(self, content: Bytes) -> bytes:
        digest = hashlib.sha256(self._owner.encode())
        digest.update(content.data)
        return digest.digest()

    def remove(self) -> None:
        """Remove the journal. The model must be synced."""
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
