"""Changed tensors made anew block by block on several threads, and a GGUF file written again with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from gguflora.errors import NonFiniteError
from gguflora.files.gguf import Layout
from gguflora.merging.rounding import RoundingOptions, RowsRounder, Sums
from gguflora.merging.sinks import Block, Progress, RowSink
from gguflora.placement.base_weights import BaseTensors, WholeTensorDeltas
from gguflora.placement.rows import AnyRows, split_rows
from gguflora.placement.target import ChangedTensor
from gguflora.quants.kernels import SUMS

Task = Callable[[], int]

BLOCK_WEIGHTS: Final = 1 << 20
"""Weights of one task: enough to make Python's share of the time small, and a few megabytes of rows."""
COPY_BYTES: Final = 64 << 20


class Rewriter:
    """Makes the targets anew, block by block, and hands them and the rest of the base to a sink.

    Args:
        weights: of the base.
        layout: of the output.
        targets: the tensors that change.
        rounding: how their weights are rounded.
        threads: number of threads.
        folder: where temporary files may be made.
        progress: called with (bytes done, bytes in all), from several threads but never at once.

    """

    def __init__(
        self,
        weights: BaseTensors,
        layout: Layout,
        targets: Sequence[ChangedTensor],
        rounding: RoundingOptions,
        *,
        threads: int,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        self._totals: dict[str, list[Sums]] = {}
        self._weights, self._layout, self._targets = weights, layout, targets
        self._rounding, self._threads, self._folder = rounding, threads, folder
        self._whole = WholeTensorDeltas(weights, targets)
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()
        self._cancelled = threading.Event()

    def sums(self, target: str) -> Sums:
        """What `_native.SUMS` names, over all rows of a target; known when `write` has returned."""
        total: Sums = np.sum(self._totals[target], axis=0)
        return total

    def write(self, sink: RowSink) -> None:
        """Hand everything over; the first error stops all threads and is raised."""
        pending: set[Future[None]] = set()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="gguflora")
        try:
            for task in self._tasks(sink):
                while len(pending) >= 2 * self._threads:
                    pending = _collect(pending)
                pending.add(pool.submit(self._run, task))
            while pending:
                pending = _collect(pending)
        finally:
            self._cancelled.set()
            pool.shutdown(cancel_futures=True)

    def _run(self, task: Task) -> None:
        done = task()
        with self._lock:
            self._done += done
            if self._progress and done:
                self._progress(self._done, self._layout.data_size)

    def _tasks(self, sink: RowSink) -> Iterator[Task]:
        """Everything to do, about in the order of the output; a task returns the number of bytes it has handed over.

        What is to be measured before rows can be written is begun before the rows in front of them are written, so that
        no thread waits for another for long. Formulas are taken in turn, for they may need a whole weight, of which
        one is held at a time.
        """
        behind: Sequence[Task] = ()
        for job in self._jobs(sink):
            if job.in_turn:
                yield from behind
                behind = ()
            yield from job.measure
            yield from behind
            behind = job.write
        yield from behind

    def _jobs(self, sink: RowSink) -> Iterator[_RewriteJob]:
        places = [(to, self._copies(sink, start, stop, to)) for start, stop, to in self._layout.copies]
        places += [(self._layout.offsets[target.name], self._changes(sink, target)) for target in self._targets]
        for _, jobs in sorted(places, key=lambda place: place[0]):
            yield from jobs

    def _copies(self, sink: RowSink, start: int, stop: int, to: int) -> Iterator[_RewriteJob]:
        places = range(start, stop, COPY_BYTES)
        tasks = [partial(self._copy, sink, at, min(at + COPY_BYTES, stop), to + at - start) for at in places]
        yield _RewriteJob((), tasks, in_turn=False)

    def _copy(self, sink: RowSink, start: int, stop: int, to: int) -> int:
        if not self._cancelled.is_set():
            sink.copy(start, stop, to)
        return stop - start

    def _changes(self, sink: RowSink, target: ChangedTensor) -> Iterator[_RewriteJob]:
        totals = self._totals[target.name] = []
        step = max(1, BLOCK_WEIGHTS // target.source.n_in)
        for rows in split_rows(target, self._whole, self._rounding.period(target)):
            totals.append(np.zeros(len(SUMS)))
            rounder = RowsRounder(self._weights, target, rows, self._rounding, self._folder, totals[-1])
            blocks = [(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]
            measure = [partial(self._measure, rounder, target, *block) for block in blocks if rounder.two_passes]
            write = [partial(self._write, sink, rounder, target, *block) for block in blocks]
            yield _RewriteJob(measure, write, in_turn=isinstance(rows, AnyRows))

    def _measure(self, rounder: RowsRounder, target: ChangedTensor, start: int, stop: int) -> int:
        with self._naming(target, start):
            rounder.measure(start, stop)  # even when cancelled, for another thread may wait for it
        return 0

    def _write(self, sink: RowSink, rounder: RowsRounder, target: ChangedTensor, start: int, stop: int) -> int:
        if self._cancelled.is_set():
            return 0
        with self._naming(target, start):
            old, new = rounder.new(start, stop)
        sink.put(Block(target, start, old, new))
        return new.nbytes

    @contextmanager
    def _naming(self, target: ChangedTensor, start: int) -> Iterator[None]:
        try:
            yield
        except NonFiniteError as error:
            row = start + error.row
            raise NonFiniteError(
                f"{self._weights.base.path}: tensor {target.name!r}, row {row}, column {error.column}: {error}; the "
                "base, an adapter, or their sum at this scale is out of range",
                row,
                error.column,
            ) from error


@dataclass(frozen=True, slots=True)
class _RewriteJob:
    """Tasks that belong together: all of ``measure`` must be begun before any of ``write`` is."""

    measure: Sequence[Task]
    write: Sequence[Task]
    in_turn: bool


def _collect(pending: set[Future[None]]) -> set[Future[None]]:
    """Wait for one of the pending tasks; raises its error."""
    done, left = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return left
