"""Bytes in order: of a file, of the result of a patch, of the base again.

Threads read and decode ahead while the caller hashes and writes, so that a file goes by in little memory.
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
from gguflora.quants.arrays import Bytes

Piece = tuple[int, Bytes]
"""Where bytes go, and the bytes."""
Task = Callable[[], Piece]

_COPY_BYTES: Final = 4 << 20
_T = TypeVar("_T")


def result(patch: Patch, base: Chain, threads: int) -> Iterator[Piece]:
    """The bytes of a patch's result, in order.

    Args:
        patch: the patch.
        base: the files of its base.
        threads: number of threads.

    Raises:
        PatchError: if the patch is damaged or the base another.
    """
    made = [(record.to, partial(_made, patch, base, record)) for record in patch.records]
    return in_order([*copied_pieces(patch, base), *made], threads)


def copied_pieces(patch: Patch, base: Chain) -> list[tuple[int, Task]]:
    """What reads the ranges that a patch copies, with their places in the result."""
    return [
        (to + at - start, partial(_copied, base, at, min(at + _COPY_BYTES, stop), to + at - start))
        for start, stop, to in patch.copies
        for at in range(start, stop, _COPY_BYTES)
    ]


def in_order(tasks: Sequence[tuple[int, Task]], threads: int) -> Iterator[Piece]:
    """The pieces that tasks make, by their places."""
    return ahead((task for _, task in sorted(tasks, key=lambda item: item[0])), threads)


def _copied(base: Chain, start: int, stop: int, to: int) -> Piece:
    return to, base.read(start, stop - start)


def _made(patch: Patch, base: Chain, record: Record) -> Piece:
    return record.to, new_bytes(patch, record, old_bytes(base, record))


def old_bytes(base: Chain, record: Record) -> Bytes:
    """The base's bytes that a record changes."""
    return np.zeros(record.length, np.uint8) if record.source is None else base.read(record.source, record.length)


def new_bytes(patch: Patch, record: Record, old: Bytes) -> Bytes:
    """The result's bytes of a record, from the base's.

    Raises:
        PatchError: if they do not come out.
    """
    new = forward(patch.payload(record), old, record.grain)
    if checksum(new) != record.new:
        raise PatchError(f"{patch.path}: the result's bytes at {record.to} come out wrong; is the base another file?")
    return new


def restored_bytes(patch: Patch, record: Record, new: Bytes) -> Bytes:
    """The base's bytes of a record, from the result's.

    Raises:
        PatchError: if they do not come out.
    """
    old = backward(patch.payload(record), new, record.grain)
    if checksum(old) != record.old:
        raise PatchError(f"{patch.path}: the base's bytes at {record.to} do not come back; the file is damaged")
    return old


def files_sha256(files: Chain, threads: int = 1) -> str:
    """SHA-256 of all bytes of files, in hexadecimal."""
    starts = range(0, files.size, _COPY_BYTES)
    return sha256(ahead((partial(_copied, files, at, min(at + _COPY_BYTES, files.size), at) for at in starts), threads))


def sha256(pieces: Iterable[Piece]) -> str:
    """SHA-256 of bytes in order, in hexadecimal."""
    digest = hashlib.sha256()
    for _, content in pieces:
        digest.update(content.data)
    return digest.hexdigest()


def ahead(tasks: Iterable[Callable[[], _T]], threads: int) -> Iterator[_T]:
    """Results of tasks in order, of which some are begun before they are asked for."""
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
