"""The scheduler: a single thread calls llama.cpp and decides which requests run, where, and what is decoded next.

Requests of one adapter set share a context and are decoded together. Each step decodes one token of every request that
is generating, and part of the prompts of requests that have just started. The next step belongs to the adapter set that
has used the least time. A set without a context waits until a context is idle or its owner's time slice is over.
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
from gguflora.engine.context import Context
from gguflora.engine.context_pool import ContextPool
from gguflora.engine.job import GenerationJob
from gguflora.engine.registry import ResolvedSet
from gguflora.engine.requests import FinishReason
from gguflora.engine.slots import Chunk
from gguflora.errors import EngineClosedError, EngineError, GenerationError, QueueFullError

T = TypeVar("T")

SLICE_SECONDS: Final = 0.5
"""Time for which a set keeps its context while another set waits for one."""

_MIXED_SHARE: Final = 4
"""While requests generate, prompts may use only 1/4 of a batch, so that the generating requests do not wait long."""


@dataclass(slots=True, eq=False)
class AdapterQueue:
    """All requests of one adapter set.

    Attributes:
        adapters: the adapter set.
        waiting: jobs without a slot, in order.
        running: jobs with a slot in the context.
        context: the context of the set, if it has one.
        spent: seconds of computing; the queue with the least comes next.
        since: value of `spent` when the set got its context.
    """

    adapters: ResolvedSet
    waiting: deque[GenerationJob] = field(default_factory=deque)
    running: list[GenerationJob] = field(default_factory=list)
    context: Context | None = None
    spent: float = 0.0
    since: float = 0.0


class Scheduler:
    """Runs jobs on a pool of contexts, in its own thread.

    Args:
        pool: the contexts; only the scheduler's thread uses them.
        queue_size: largest number of jobs that wait to start.
        finished: called in the scheduler's thread with each job that has ended, before its caller is told.

    Attributes:
        ended: number of ended jobs by finish reason.
        tokens: number of tokens of ended jobs: "prompt", "out" and "reused"; and of all decoded tokens: "decoded".
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
        """Number of jobs that have not started."""
        return self._queued

    @property
    def running(self) -> int:
        """Number of jobs that have started and not ended. Only for the scheduler's thread."""
        return sum(job.started for queue in self._queues.values() for job in [*queue.running, *queue.waiting])

    def submit(self, job: GenerationJob) -> None:
        """Put a job into the queue.

        Raises:
            QueueFullError: if too many jobs are waiting.
            EngineClosedError: if the scheduler is closed.
        """
        with self._wake:
            if self._closing:
                raise EngineClosedError("the engine is closed")
            if self._queued >= self._queue_size:
                raise QueueFullError(f"{self._queued} requests are waiting already; try again later")
            self._queued += 1
            self._arrived.append(job)
            self._wake.notify()

    def call(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the scheduler's thread, between two steps, and return its result.

        Raises:
            EngineClosedError: if the scheduler is closed.
        """
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
        """Process arrived jobs and calls, and wait for some if no job is left; return False once closed."""
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
            # with 0, a new queue would have every turn until it has caught up
            spent = min((queue.spent for queue in self._queues.values()), default=0.0)
            self._queues[identity] = AdapterQueue(job.adapters, spent=spent)
        self._queues[identity].waiting.append(job)

    def _sweep(self) -> None:
        """End jobs that are cancelled or timed out, and remove queues without jobs."""
        for identity, queue in list(self._queues.items()):
            for job in [*queue.running, *queue.waiting]:
                reason = job.interruption
                if reason is not None:
                    self._leave(queue, job)
                    self._end(job, reason)
            if not queue.running and not queue.waiting:
                del self._queues[identity]

    def _admit(self) -> None:
        """Start waiting jobs, those of the queue with the least time first."""
        for queue in sorted(self._queues.values(), key=lambda queue: queue.spent):
            if queue.waiting:
                self._guarded(queue, self._fill)

    def _guarded(self, queue: AdapterQueue, work: Callable[[AdapterQueue], None]) -> None:
        """Call ``work`` on a queue; if it raises, end the jobs of this queue only."""
        try:
            work(queue)
        except Exception as error:
            self._fail(queue, [*queue.running, *queue.waiting], error)

    def _fill(self, queue: AdapterQueue) -> None:
        """Start jobs of ``queue`` while its context has room."""
        if queue.context is None and not self._find_context(queue):
            return
        while queue.waiting and self._start(queue, queue.waiting[0]):
            queue.running.append(queue.waiting.popleft())

    def _find_context(self, queue: AdapterQueue) -> bool:
        """Give ``queue`` a context, perhaps one from a queue whose time slice is over; return whether it has one."""
        context = self.pool.context_of(queue.adapters)
        if context is None:
            owners = [other for other in self._queues.values() if other.context is not None]
            expired = [other for other in owners if other.spent - other.since >= SLICE_SECONDS]
            if not expired:
                return False
            self._suspend(max(expired, key=lambda other: other.spent))
            context = self.pool.context_of(queue.adapters)
        queue.context, queue.since = context, queue.spent
        return context is not None

    def _suspend(self, queue: AdapterQueue) -> None:
        """Take the context away from a queue; its running jobs wait again."""
        for job in reversed(queue.running):
            self._save(queue, job)
            self._leave_slot(queue, job)
            queue.waiting.appendleft(job)
        queue.running.clear()
        queue.context = None

    def _save(self, queue: AdapterQueue, job: GenerationJob) -> None:
        """Copy a job's slot if there is memory for it; otherwise the job's tokens will be computed again."""
        context, slot = queue.context, job.slot
        assert context is not None
        assert slot is not None
        in_use = sum(len(job.saved.data) for other in self._queues.values() for job in other.waiting if job.saved)
        if slot.held and in_use + context.state_bytes(slot) <= self.pool.saved_bytes:
            job.saved = context.save(slot)

    def _start(self, queue: AdapterQueue, job: GenerationJob) -> bool:
        """Start ``job`` if a slot is free and the context has room for its tokens; return whether it started."""
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
        """Decode the next tokens of every job, and sample a token for each job whose prompt is complete."""
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
        """Return the chunks to decode, by group: a token of each generating job, then prompts in order of arrival."""
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
            newest = queue.running.pop()  # it waits until the others have ended
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
        reported = error if isinstance(error, EngineError) else GenerationError(f"the request failed: {error}")
        for job in jobs:
            if context is not None and job.slot is not None:
                context.keep(job.slot, 0)
            self._leave(queue, job)
            self._end(job, "error", reported)

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
    """Split a plan into groups that can each be decoded in one batch."""
    groups: dict[tuple[bool, bool, Identity], list[tuple[GenerationJob, Chunk]]] = {}
    for job, chunk in plan:
        groups.setdefault(chunk.group, []).append((job, chunk))
    return list(groups.values())
