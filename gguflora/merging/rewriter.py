"""Rewrite a GGUF file: requantize changed tensors in blocks of rows on several threads, copy the rest."""

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
from gguflora.merging.rounding import TOTALS, RoundingOptions, RowsRounder, Sums, calibrated_rows
from gguflora.merging.sinks import Block, Progress, RowSink
from gguflora.placement.base_weights import BaseTensors, WholeTensorDeltas
from gguflora.placement.rows import AnyRows, LowRankRows, split_rows
from gguflora.placement.target import ChangedTensor
from gguflora.quants.arrays import Float32Array

Task = Callable[[], int]

BLOCK_WEIGHTS: Final = 1 << 20
"""Weights of one task: enough to keep Python's overhead small, while its rows take only a few megabytes."""
COPY_BYTES: Final = 64 << 20


class Rewriter:
    """Requantizes changed tensors in blocks and passes them and the rest of the base to a sink.

    Args:
        weights: weights of the base.
        layout: layout of the output.
        targets: the changed tensors.
        rounding: rounding of their weights.
        threads: number of threads.
        folder: directory for temporary files.
        progress: called with (bytes done, bytes in total); calls come from several threads but never overlap.
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
        """Return the `TOTALS` over all rows of a target. Call it after `write` has returned."""
        total: Sums = np.sum(self._totals[target], axis=0)
        return total

    def write(self, sink: RowSink) -> None:
        """Write everything to the sink. The first error stops all threads and is raised."""
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
        """Yield all tasks, roughly in the order of the output. A task returns the number of bytes it has written.

        The measuring tasks of a job come before the writing tasks of the job in front of it, so that threads rarely
        wait for measurements. Jobs that may need a whole weight run in turn, so that only one such weight is in memory.
        """
        pending_writes: Sequence[Task] = ()
        for job in self._jobs(sink):
            if job.in_turn:
                yield from pending_writes
                pending_writes = ()
            yield from job.measure
            yield from pending_writes
            pending_writes = job.write
        yield from pending_writes

    def _jobs(self, sink: RowSink) -> Iterator[_RewriteJob]:
        jobs_at = [(to, self._copies(sink, start, stop, to)) for start, stop, to in self._layout.copies]
        jobs_at += [(self._layout.offsets[target.name], self._changes(sink, target)) for target in self._targets]
        for _, jobs in sorted(jobs_at, key=lambda item: item[0]):
            yield from jobs

    def _copies(self, sink: RowSink, start: int, stop: int, to: int) -> Iterator[_RewriteJob]:
        offsets = range(start, stop, COPY_BYTES)
        tasks = [partial(self._copy, sink, at, min(at + COPY_BYTES, stop), to + at - start) for at in offsets]
        yield _RewriteJob((), tasks, in_turn=False)

    def _copy(self, sink: RowSink, start: int, stop: int, to: int) -> int:
        if not self._cancelled.is_set():
            sink.copy(start, stop, to)
        return stop - start

    def _changes(self, sink: RowSink, target: ChangedTensor) -> Iterator[_RewriteJob]:
        totals = self._totals[target.name] = []
        step = max(1, BLOCK_WEIGHTS // target.source.n_in)
        for rows in split_rows(target, self._whole, self._rounding.period(target)):
            totals.append(np.zeros(len(TOTALS)))
            moments = None if self._weights.is_precise else self._rounding.moments_of(target, rows.start)
            if moments is not None:
                task = partial(self._calibrate, sink, target, rows, moments, totals[-1])
                yield _RewriteJob((), [task], in_turn=isinstance(rows, AnyRows))
                continue
            rounder = RowsRounder(self._weights, target, rows, self._rounding, self._folder, totals[-1])
            blocks = [(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]
            measure = [partial(self._measure, rounder, target, *block) for block in blocks if rounder.is_stochastic]
            write = [partial(self._write, sink, rounder, target, *block) for block in blocks]
            yield _RewriteJob(measure, write, in_turn=isinstance(rows, AnyRows))

    def _measure(self, rounder: RowsRounder, target: ChangedTensor, start: int, stop: int) -> int:
        with self._located_errors(target, start):
            rounder.measure(start, stop)  # even when cancelled: another thread may be waiting for it
        return 0

    def _write(self, sink: RowSink, rounder: RowsRounder, target: ChangedTensor, start: int, stop: int) -> int:
        if self._cancelled.is_set():
            return 0
        with self._located_errors(target, start):
            old, new = rounder.new(start, stop)
        sink.put(Block(target, start, old, new))
        return new.nbytes

    def _calibrate(
        self,
        sink: RowSink,
        target: ChangedTensor,
        rows: LowRankRows | AnyRows,
        moments: tuple[Float32Array, Float32Array],
        total: Sums,
    ) -> int:
        if self._cancelled.is_set():
            return 0
        with self._located_errors(target, rows.start):
            old, new = calibrated_rows(self._weights, target, rows, self._rounding, moments, total)
        sink.put(Block(target, rows.start, old, new))
        return new.nbytes

    @contextmanager
    def _located_errors(self, target: ChangedTensor, start: int) -> Iterator[None]:
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
    """Tasks for a range of rows. All tasks of ``measure`` must start before any task of ``write``."""

    measure: Sequence[Task]
    write: Sequence[Task]
    in_turn: bool


def _collect(pending: set[Future[None]]) -> set[Future[None]]:
    """Wait until a pending task is done and raise its error; return the tasks that are still pending."""
    done, still_pending = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return still_pending
