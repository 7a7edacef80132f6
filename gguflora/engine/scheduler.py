"""The thread that calls llama.cpp. It decides which requests run and what is decoded next.

All requests share one context. Every step decodes one token of each request that is generating, and part of the prompts
of those that have just started: requests of different adapter sets in one batch where they can be mixed, otherwise the
requests of one set, the one that has used the least time. A request that finds no slot waits until one is free, or
until the time slice of another set is over.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final, TypeVar

from gguflora.engine.adapter_sets import Identity
from gguflora.engine.batch_planner import AdapterQueue, BatchPlanner, PlannedBatch
from gguflora.engine.context import Context
from gguflora.engine.job import GenerationJob
from gguflora.engine.requests import FinishReason
from gguflora.engine.slots import Chunk
from gguflora.errors import EngineClosedError, EngineError, GenerationError, MixingError, QueueFullError
from gguflora.runtime.mixed_adapters import MixedAdapters

T = TypeVar("T")

SLICE_SECONDS: Final = 0.5
"""Time for which a set keeps its slots while another set waits for one."""


class Scheduler:
    """Runs jobs in a context, in its own thread.

    Args:
        context: the context; only the scheduler's thread uses it.
        mixed: applies several adapter sets in one batch of the context.
        queue_size: largest number of jobs that wait to start.
        finished: called in the scheduler's thread with each job that has ended, before its caller is told.

    Attributes:
        ended: number of ended jobs by finish reason.
        tokens: number of tokens of ended jobs: "prompt", "out" and "reused"; and of all decoded tokens: "decoded".
        steps: number of decoded batches: "mixed" ones of several adapter sets, and "single" ones of one.
        saved_bytes: memory for copies of suspended slots, in bytes.
    """

    def __init__(
        self, context: Context, mixed: MixedAdapters, queue_size: int, finished: Callable[[GenerationJob], None]
    ) -> None:
        self.context = context
        self.ended: Counter[FinishReason] = Counter()
        self.tokens: Counter[str] = Counter()
        self.steps: Counter[str] = Counter()
        self.saved_bytes = context.kv_bytes or 0
        self._planner = BatchPlanner(context.n_batch, mixed)
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
    def has_room(self) -> bool:
        """Whether `submit` would take a job now."""
        return not self._closing and self._queued < self._queue_size

    @property
    def running(self) -> int:
        """Number of jobs that have started and not ended. Only for the scheduler's thread."""
        return sum(job.started for queue in self._queues.values() for job in queue.jobs)

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
            try:
                self._admit()
                self._step()
            except Exception as error:  # nothing may end the thread: no caller would ever be answered
                self._fail(self._running(), error)
        for queue in self._queues.values():
            for job in queue.jobs:
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
            for job in queue.jobs:
                reason = job.interruption
                if reason is not None:
                    self._leave(job)
                    self._end(job, reason)
            if not queue.jobs:
                del self._queues[identity]

    def _running(self) -> list[GenerationJob]:
        return [job for queue in self._queues.values() for job in queue.running]

    def _queue_of(self, job: GenerationJob) -> AdapterQueue:
        return self._queues[job.adapters.base_phase.identity]

    def _admit(self) -> None:
        """Start waiting jobs, those of the queue with the least time first."""
        for queue in sorted(self._queues.values(), key=lambda queue: queue.spent):
            try:
                self._fill(queue)
            except Exception as error:
                self._fail(queue.jobs, error)

    def _fill(self, queue: AdapterQueue) -> None:
        """Start jobs of ``queue`` while there is room, for the first one perhaps at the cost of another set."""
        while queue.waiting and (self._start(queue) or (not queue.running and self._suspend_for(queue))):
            pass

    def _start(self, queue: AdapterQueue) -> bool:
        """Start the first waiting job if a slot is free and the context has room; return whether it started."""
        context, job, running = self.context, queue.waiting[0], self._running()
        in_use = sum(len(other.keys) for other in running)
        if running and in_use + len(job.keys) + len(running) + 1 > context.n_cells:
            return False
        slot = context.restore(job.saved) if job.saved else None
        slot = slot or context.take(job.reusable_keys, job.adapters.base_phase.identity)
        if slot is None:
            return False
        slot.names = job.adapters.names
        if not job.started:
            with self._wake:
                self._queued -= 1
        job.start(slot)
        if not queue.running:
            queue.since = queue.spent
        queue.running.append(queue.waiting.popleft())
        return True

    def _suspend_for(self, queue: AdapterQueue) -> bool:
        """Suspend the newest job of another set whose time slice is over; return whether there is one."""
        others = [other for other in self._queues.values() if other is not queue and other.running]
        expired = [other for other in others if other.spent - other.since >= SLICE_SECONDS]
        if not expired:
            return False
        other = max(expired, key=lambda other: other.spent)
        self._save(other.running[-1])
        self._put_back(other.running[-1])
        other.since = other.spent
        return True

    def _put_back(self, job: GenerationJob) -> None:
        """Take a running job's slot away; it is the next of its set to start."""
        queue = self._queue_of(job)
        queue.running.remove(job)
        self._leave_slot(job)
        queue.waiting.appendleft(job)

    def _save(self, job: GenerationJob) -> None:
        """Copy a job's slot if there is memory for it; otherwise the job's tokens will be computed again."""
        assert job.slot is not None
        waiting = (other for queue in self._queues.values() for other in queue.waiting)
        in_use = sum(len(other.saved.data) for other in waiting if other.saved)
        if job.slot.held and in_use + self.context.state_bytes(job.slot) <= self.saved_bytes:
            job.saved = self.context.save(job.slot)

    def _step(self) -> None:
        """Decode the next tokens of the jobs whose turn it is; sample a token for each whose prompt is complete."""
        batches = self._planner.plan(list(self._queues.values()))
        while batches and not self.context.make_room(sum(batch.n_tokens for batch in batches)):
            newest = max(self._running(), key=lambda job: job.slot_taken)
            if len(self._running()) == 1:
                self._fail([newest], GenerationError("the context is full"))
                return
            self._put_back(newest)  # it waits until the others have ended
            batches = self._planner.plan(list(self._queues.values()))
        for batch in batches:
            self._decode(batch)

    def _decode(self, batch: PlannedBatch) -> None:
        started = time.perf_counter()
        try:
            outputs = self.context.decode([chunk for _, chunk in batch.chunks], mixed=batch.mixed)
        except MixingError:
            return  # nothing was lost: what is left to decode is planned again
        except Exception as error:
            if batch.n_sets > 1:  # it may be the fault of one set
                for each in batch.by_set():
                    self._decode(each)
            else:
                self._fail([job for job, _ in batch.chunks], error)
            return
        seconds = time.perf_counter() - started
        self.tokens["decoded"] += batch.n_tokens
        self.steps["mixed" if batch.n_sets > 1 else "single"] += 1
        self._planner.note(batch, seconds)
        for job, _ in batch.chunks:
            self._queue_of(job).spent += seconds / len(batch.chunks)
        for (job, chunk), indices in zip(batch.chunks, outputs, strict=True):
            if indices:
                self._advance(job, chunk, indices)
        if self.context.has_nan:  # what the other jobs have computed may be spoilt from now on
            for job in reversed(self._running()):
                self._put_back(job)
            self.context.forget()

    def _advance(self, job: GenerationJob, chunk: Chunk, indices: Sequence[int]) -> None:
        try:
            if chunk.wants_all_logits:
                job.score(self.context, chunk, indices)
            reason = job.advance(self.context, indices[-1]) if chunk.wants_logits else None
        except EngineError as error:
            self._fail([job], error)
            return
        if reason is not None:
            self._leave(job)
            self._end(job, reason)

    def _leave(self, job: GenerationJob) -> None:
        queue = self._queue_of(job)
        if job in queue.running:
            queue.running.remove(job)
            self._leave_slot(job)
        elif job in queue.waiting:
            queue.waiting.remove(job)
            if not job.started:
                with self._wake:
                    self._queued -= 1

    def _leave_slot(self, job: GenerationJob) -> None:
        if job.slot is not None:
            self.context.release(job.slot)
        job.slot = None

    def _fail(self, jobs: Sequence[GenerationJob], error: Exception) -> None:
        reported = error if isinstance(error, EngineError) else GenerationError(f"the request failed: {error}")
        for job in jobs:
            if job.slot is not None:
                self.context.keep(job.slot, 0)
            self._leave(job)
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
