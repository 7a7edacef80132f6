"""A GGUF file written again with changes in some of its tensors: block by block, on several threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import IO, Final

from gguflora.changed_rows import AnyRows, Bytes, LowRankRows, Target, WholeWeights, split_rows
from gguflora.errors import NonFiniteError
from gguflora.files.copying import copy_range
from gguflora.files.gguf import GgufFile, Layout

Progress = Callable[[int, int], None]
Task = Callable[[], int]

BLOCK_WEIGHTS: Final = 1 << 20
"""Weights of one task: enough to make Python's share of the time small, and a few megabytes of rows."""
COPY_BYTES: Final = 64 << 20


class Rewriter:
    """Writes the output: header, copied ranges, and the targets block by block."""

    def __init__(
        self, base: GgufFile, layout: Layout, targets: Sequence[Target], threads: int, progress: Progress | None
    ) -> None:
        self._base = base
        self._layout = layout
        self._targets = targets
        self._threads = threads
        self._whole = WholeWeights(base, targets)
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()
        self._cancelled = threading.Event()

    def write(self, output: IO[bytes]) -> None:
        """Write everything; the first error stops all threads and is raised."""
        handle = output.fileno()
        os.truncate(handle, self._layout.size)
        os.pwrite(handle, self._layout.header, 0)
        pending: set[Future[None]] = set()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="gguflora")
        try:
            for task in self._tasks(handle):
                while len(pending) >= 2 * self._threads:
                    pending = _collect(pending)
                pending.add(pool.submit(self._run, task))
            while pending:
                pending = _collect(pending)
        finally:
            self._cancelled.set()
            pool.shutdown(cancel_futures=True)

    def _run(self, task: Task) -> None:
        if self._cancelled.is_set():
            return
        done = task()
        with self._lock:
            self._done += done
            if self._progress:
                self._progress(self._done, self._layout.size - len(self._layout.header))

    def _tasks(self, handle: int) -> Iterator[Task]:
        """Everything to do, in the order of the output; a task returns the number of bytes it wrote."""
        parts = [(to, self._copies(handle, first, last, to)) for first, last, to in self._layout.copies]
        for target in self._targets:
            offset = self._layout.offsets[target.name]
            parts.append((offset, self._blocks(handle, target, offset)))
        for _, tasks in sorted(parts, key=lambda part: part[0]):
            yield from tasks

    def _copies(self, handle: int, start: int, end: int, to: int) -> Iterator[Task]:
        for first in range(start, end, COPY_BYTES):
            yield partial(self._copy, handle, first, min(first + COPY_BYTES, end), to + first - start)

    def _copy(self, handle: int, start: int, end: int, to: int) -> int:
        copy_range(self._base.fileno(), start, handle, to, end - start)
        return end - start

    def _blocks(self, handle: int, target: Target, offset: int) -> Iterator[Task]:
        step = max(1, BLOCK_WEIGHTS // target.source.n_in)
        for rows in split_rows(self._base, target, self._whole):
            for first in range(rows.start, rows.end, step):
                yield partial(self._write_rows, handle, offset, rows, first, min(first + step, rows.end))

    def _write_rows(self, handle: int, offset: int, rows: LowRankRows | AnyRows, first: int, last: int) -> int:
        try:
            new = rows.new(first, last)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{self._base.path}: tensor {rows.tensor.name!r}, row {first + error.row}, column {error.column}: "
                f"{error}; the base, an adapter, or their sum at this scale is out of range",
                first + error.row,
                error.column,
            ) from error
        _write_at(handle, new, offset + first * new.shape[1])
        return new.nbytes


def _collect(pending: set[Future[None]]) -> set[Future[None]]:
    """Wait for one of the pending tasks; raises its error."""
    done, left = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return left


def _write_at(handle: int, rows: Bytes, offset: int) -> None:
    view = memoryview(rows.data).cast("B")
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
