"""Stream the bytes of a file, of the result of a patch, or of its base, in order.

Threads read and decode ahead while the caller hashes and writes, so that little memory is needed.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final, TypeVar

import numpy as np

from gguflora.errors import PatchError
from gguflora.merging.patch.chain import Chain
from gguflora.merging.patch.coding import backward, forward
from gguflora.merging.patch.format import Patch, Record, checksum
from gguflora.merging.sinks import Progress
from gguflora.quants.arrays import Bytes

FilePiece = tuple[int, Bytes]
"""Offset in the result, and the bytes there."""
Task = Callable[[], FilePiece]

_COPY_BYTES: Final = 4 << 20
_T = TypeVar("_T")


def result(patch: Patch, base: Chain, threads: int) -> Iterator[FilePiece]:
    """Yield the bytes of a patch's result, in order.

    Args:
        patch: the patch.
        base: the files of its base.
        threads: number of threads.

    Raises:
        PatchError: if the patch is damaged or was made for another base.
    """
    decoded = [(record.to, partial(_decode_record, patch, base, record)) for record in patch.records]
    return in_order([*copied_pieces(patch, base), *decoded], threads)


def copied_pieces(patch: Patch, base: Chain) -> list[tuple[int, Task]]:
    """Return tasks that read the ranges that a patch copies, with their offsets in the result."""
    return [
        (to + at - start, partial(_read_copy, base, at, min(at + _COPY_BYTES, stop), to + at - start))
        for start, stop, to in patch.copies
        for at in range(start, stop, _COPY_BYTES)
    ]


def in_order(tasks: Sequence[tuple[int, Task]], threads: int) -> Iterator[FilePiece]:
    """Run tasks and yield their pieces, sorted by offset."""
    return ahead((task for _, task in sorted(tasks, key=lambda item: item[0])), threads)


def _read_copy(base: Chain, start: int, stop: int, to: int) -> FilePiece:
    return to, base.read(start, stop - start)


def _decode_record(patch: Patch, base: Chain, record: Record) -> FilePiece:
    return record.to, new_bytes(patch, record, old_bytes(base, record))


def old_bytes(base: Chain, record: Record) -> Bytes:
    """Read the base's bytes that a record changes, or zeros if it has no source."""
    return np.zeros(record.length, np.uint8) if record.source is None else base.read(record.source, record.length)


def new_bytes(patch: Patch, record: Record, old: Bytes) -> Bytes:
    """Compute the result's bytes of a record from the base's bytes.

    Raises:
        PatchError: if their checksum is wrong.
    """
    new = forward(patch.payload(record), old, record.grain)
    if checksum(new) != record.new:
        raise PatchError(
            f"{patch.path}: the result's bytes at {record.to} have a wrong checksum; is this the right base?"
        )
    return new


def restored_bytes(patch: Patch, record: Record, new: Bytes) -> Bytes:
    """Compute the base's bytes of a record from the result's bytes.

    Raises:
        PatchError: if their checksum is wrong.
    """
    old = backward(patch.payload(record), new, record.grain)
    if checksum(old) != record.old:
        raise PatchError(f"{patch.path}: the base's bytes at {record.to} have a wrong checksum; the file is damaged")
    return old


def files_sha256(files: Chain, threads: int = 1) -> str:
    """Return the SHA-256 of all bytes of files, in hexadecimal."""
    starts = range(0, files.size, _COPY_BYTES)
    return sha256(
        ahead((partial(_read_copy, files, at, min(at + _COPY_BYTES, files.size), at) for at in starts), threads)
    )


def sha256(pieces: Iterable[FilePiece]) -> str:
    """Return the SHA-256 of pieces in order, in hexadecimal."""
    digest = hashlib.sha256()
    for _, content in pieces:
        digest.update(content.data)
    return digest.hexdigest()


def with_progress(pieces: Iterable[FilePiece], total: int, progress: Progress | None) -> Iterator[FilePiece]:
    """Pass pieces on and report the bytes that the caller has consumed."""
    for to, content in pieces:
        yield to, content
        if progress:
            progress(to + len(content), total)


def ahead(tasks: Iterable[Callable[[], _T]], threads: int) -> Iterator[_T]:
    """Run tasks on threads ahead of the caller and yield their results in order."""
    pending: deque[Future[_T]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="gguflora")
    try:
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) > threads + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
