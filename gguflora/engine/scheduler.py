"""The one thread that works in llama.cpp: which requests run, in which context, and what is decoded next.

Requests of one adapter set share a context and are decoded together: every step decodes one token of each that
generates, and a part of the prompts of those that begin. Contexts take turns by the time they have used. A set that
finds no context waits for an idle one, or for a busy one to have had its slice.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final, TypeVar

from gguflora.engine.adapter_sets import Identity
from gguflora.engine.context import Chunk, Context
from gguflora.engine.context_pool import ContextPool
from gguflora.engine.job import GenerationJob
from gguflora.engine.registry import ResolvedSet
from gguflora.engine.requests import FinishReason
from gguflora.errors import EngineClosedError, EngineError, GenerationError, QueueFullError

T = TypeVar("T")

SLICE_SECONDS: Final = 0.5
"""How long a context stays with a set while another waits for one."""

_MIXED_SHARE: Final = 4
"""While others generate, a prompt may fill a batch to this fraction only: they wait for it."""


@dataclass(slots=True, eq=False)
class AdapterQueue:
    """All requests of one adapter set.

    Attributes:
        spent: seconds of computing, the measure of whose turn it is.
        since: `spent` when it got its context.
    """

    adapters: ResolvedSet
    waiting: deque[GenerationJob] = field(default_factory=deque)
    running: list[GenerationJob] = field(default_factory=list)
    context: Context | None = None
    spent: float = 0.0
    since: float = 0.0


class Scheduler:
    """Runs jobs on a pool of contexts in a thread of its own.

    Args:
        pool: used by this thread only.
        queue_size: how many jobs may wait before they run for the first time.
        finished: told of every job that has ended, in the thread, before its caller is.
    """

    def __init__(self, pool: ContextPool, queue_size: int, finished: Callable[[GenerationJob], None]) -> None:
        self.pool = pool
        self.ended: Counter[FinishReason] = Counter()
        self.tokens: Counter[str] = Counter()
        self._queue_size = queue_size
        self._finished = finished
        self._queues: dict[Identity, AdapterQueue] = {}
        self._arrived: deque[GenerationJob | Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._queued = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="gguflora-engine", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Jobs that have not begun."""
        return self._queued

    @property
    def running(self) -> int:
        """Jobs that have begun and not ended. In the thread only."""
        return sum(job.started for queue in self._queues.values() for job in [*queue.running, *queue.waiting])

    def submit(self, job: GenerationJob) -> None:
        """Let a job wait for its turn.

        Raises:
            QueueFullError: if too many do.
        """
        with self._wake:
            if self._closing:
                raise EngineClosedError("the engine is closed")
            if self._queued >= self._queue_size:
                raise QueueFullError(f"{self._queued} requests wait already; try again later")
            self._queued += 1
            self._arrived.append(job)
            self._wake.notify()

    def call(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the thread between two steps, and wait for it."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        with self._wake:
            if self._closing:
                raise EngineClosedError("the engine is closed")
            self._arrived.append(run)
            self._wake.notify()
        return done.result()

    def close(self) -> None:
        """Cancel all jobs and end the thread. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while self._receive():
            self._sweep()
            self._admit()
            queue = self._next_queue()
            if queue is not None:
                self._guarded(queue, self._step)
        for queue in self._queues.values():
            for job in [*queue.running, *queue.waiting]:
                self._end(job, "cancelled")

    def _receive(self) -> bool:
        """Take in what has arrived, waiting for it if there is nothing else to do; False once closed."""
        while True:
            with self._wake:
                while not (self._arrived or self._closing or self._queues):
                    self._wake.wait()
                arrived = list(self._arrived)
                self._arrived.clear()
                closing = self._closing
            for item in arrived:
                if isinstance(item, GenerationJob):
                    self._enqueue(item)
                else:
                    item()
            if closing:
                return False
            if self._queues:
                return True

    def _enqueue(self, job: GenerationJob) -> None:
        identity = job.adapters.base_phase.identity
        if identity not in self._queues:
            # not 0: a newcomer would have every turn until it has caught up
            spent = min((queue.spent for queue in self._queues.values()), default=0.0)
            self._queues[identity] = AdapterQueue(job.adapters, spent=spent)
        self._queues[identity].waiting.append(job)

    def _sweep(self) -> None:
        """End jobs that were cancelled or are out of time; forget lanes without jobs."""
        for identity, queue in list(self._queues.items()):
            for job in [*queue.running, *queue.waiting]:
                reason = job.interruption
                if reason is not None:
                    self._leave(queue, job)
                    self._end(job, reason)
            if not queue.running and not queue.waiting:
                del self._queues[identity]

    def _admit(self) -> None:
        """Let waiting jobs into their contexts, the lanes with the least time first."""
        for queue in sorted(self._queues.values(), key=lambda queue: queue.spent):
            if queue.waiting:
                self._guarded(queue, self._fill)

    def _guarded(self, queue: AdapterQueue, work: Callable[[AdapterQueue], None]) -> None:
        """Whatever goes wrong in one lane ends the jobs of that lane only."""
        try:
            work(queue)
        except Exception as error:
            self._fail(queue, [*queue.running, *queue.waiting], error)

    def _fill(self, queue: AdapterQueue) -> None:
        """Start jobs of ``queue`` while there is a context and room in it."""
        if queue.context is None and not self._find_context(queue):
            return
        while queue.waiting and self._start(queue, queue.waiting[0]):
            queue.running.append(queue.waiting.popleft())

    def _find_context(self, queue: AdapterQueue) -> bool:
        """Give ``queue`` a context, if need be that of a lane whose slice is over; whether it has one."""
        context = self.pool.context_of(queue.adapters)
        if context is None:
            holders = [other for other in self._queues.values() if other.context is not None]
            over = [other for other in holders if other.spent - other.since >= SLICE_SECONDS]
            if not over:
                return False
            self._suspend(max(over, key=lambda other: other.spent))
            context = self.pool.context_of(queue.adapters)
        queue.context, queue.since = context, queue.spent
        return context is not None

    def _suspend(self, queue: AdapterQueue) -> None:
        """Take a lane's context away; its jobs wait for their next turn."""
        for job in reversed(queue.running):
            self._save(queue, job)
            self._leave_slot(queue, job)
            queue.waiting.appendleft(job)
        queue.running.clear()
        queue.context = None

    def _save(self, queue: AdapterQueue, job: GenerationJob) -> None:
        """Keep what a job's slot holds, if there is memory for it; else it is computed again."""
        context, slot = queue.context, job.slot
        assert context is not None
        assert slot is not None
        kept = sum(len(job.saved.data) for other in self._queues.values() for job in other.waiting if job.saved)
        if slot.held and kept + context.state_bytes(slot) <= self.pool.saved_bytes:
            job.saved = context.save(slot)

    def _start(self, queue: AdapterQueue, job: GenerationJob) -> bool:
        """Give ``job`` a slot of its lane's context, if there is one and room for it."""
        context = queue.context
        assert context is not None
        in_use = sum(len(running.keys) for running in queue.running)
        if queue.running and in_use + len(job.keys) + len(queue.running) + 1 > context.n_cells:
            return False
        slot = context.restore(job.saved) if job.saved else None
        slot = slot or context.take(job.keys)
        if slot is None:
            return False
        if not job.started:
            with self._wake:
                self._queued -= 1
        job.start(slot)
        return True

    def _next_queue(self) -> AdapterQueue | None:
        running = [queue for queue in self._queues.values() if queue.running]
        return min(running, key=lambda queue: queue.spent) if running else None

    def _step(self, queue: AdapterQueue) -> None:
        """Decode what is next of every job, and choose the next token of those whose turn has come."""
        started = time.perf_counter()
        for group in self._plan(queue):
            self._decode(queue, group)
        queue.spent += time.perf_counter() - started

    def _decode(self, queue: AdapterQueue, group: Sequence[tuple[GenerationJob, Chunk]]) -> None:
        context = queue.context
        assert context is not None
        chunks = [chunk for _, chunk in group]
        try:
            indices = iter(context.decode(chunks))
        except EngineError as error:
            self._fail(queue, [job for job, _ in group], error)
            return
        self.tokens["decoded"] += sum(len(chunk.keys) for chunk in chunks)
        for job, chunk in group:
            if chunk.wants_logits:
                self._advance(queue, job, context, next(indices))

    def _advance(self, queue: AdapterQueue, job: GenerationJob, context: Context, index: int) -> None:
        try:
            reason = job.advance(context, index)
        except EngineError as error:
            self._fail(queue, [job], error)
            return
        if reason is not None:
            self._leave(queue, job)
            self._end(job, reason)

    def _plan(self, queue: AdapterQueue) -> list[list[tuple[GenerationJob, Chunk]]]:
        """What to decode, by group: one token of each job that generates, then prompts in order of arrival."""
        context = queue.context
        assert context is not None
        generating = any(job.remaining == 1 for other in self._queues.values() for job in other.running)
        budget = context.n_batch // _MIXED_SHARE if generating else context.n_batch
        budget = max(budget, len(queue.running))
        while True:
            plan, left = [], budget
            for job in sorted(queue.running, key=lambda job: job.remaining > 1):
                if left:
                    chunk = job.chunk(left)
                    plan.append((job, chunk))
                    left = max(left - len(chunk.keys), 0)
            if context.make_room(sum(len(chunk.keys) for _, chunk in plan)):
                return _grouped(plan)
            if len(queue.running) == 1:
                raise GenerationError("the context is full")
            newest = queue.running.pop()  # it waits until the others have done
            self._leave_slot(queue, newest)
            queue.waiting.appendleft(newest)

    def _leave(self, queue: AdapterQueue, job: GenerationJob) -> None:
        if job in queue.running:
            queue.running.remove(job)
            self._leave_slot(queue, job)
            if not queue.running:
                queue.context = None
        elif job in queue.waiting:
            queue.waiting.remove(job)
            if not job.started:
                with self._wake:
                    self._queued -= 1

    @staticmethod
    def _leave_slot(queue: AdapterQueue, job: GenerationJob) -> None:
        if job.slot is not None and queue.context is not None:
            queue.context.release(job.slot)
        job.slot = None

    def _fail(self, queue: AdapterQueue, jobs: Sequence[GenerationJob], error: Exception) -> None:
        context = queue.context
        told = error if isinstance(error, EngineError) else GenerationError(f"computing the request failed: {error}")
        for job in jobs:
            if context is not None and job.slot is not None:
                context.keep(job.slot, 0)
            self._leave(queue, job)
            self._end(job, "error", told)

    def _end(self, job: GenerationJob, reason: FinishReason, error: EngineError | None = None) -> None:
        if job.ended:
            return
        self.ended[reason] += 1
        self.tokens["prompt"] += job.usage.prompt_tokens
        self.tokens["out"] += job.usage.completion_tokens
        self.tokens["reused"] += job.usage.reused_tokens
        try:
            self._finished(job)
        finally:
            job.end(reason, error)


def _grouped(plan: Sequence[tuple[GenerationJob, Chunk]]) -> list[list[tuple[GenerationJob, Chunk]]]:
    """Parts of the plan that can each be decoded in one batch."""
    groups: dict[tuple[bool, bool, Identity], list[tuple[GenerationJob, Chunk]]] = {}
    for job, chunk in plan:
        groups.setdefault(chunk.group, []).append((job, chunk))
    return list(groups.values())
