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
from gguflora.engine.context_pool import Pool
from gguflora.engine.job import GenerationJob
from gguflora.engine.registry import ResidentSet
from gguflora.engine.requests import FinishReason
from gguflora.errors import EngineClosedError, EngineError, GenerationError, QueueFullError

T = TypeVar("T")

SLICE_SECONDS: Final = 0.5
"""How long a context stays with a set while another waits for one."""

_MIXED_SHARE: Final = 4
"""While others generate, a prompt may fill a batch to this fraction only: they wait for it."""


@dataclass(slots=True, eq=False)
class Lane:
    """All requests of one adapter set.

    Attributes:
        spent: seconds of computing, the measure of whose turn it is.
        since: `spent` when it got its context.
    """

    adapters: ResidentSet
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

    def __init__(self, pool: Pool, queue_size: int, finished: Callable[[GenerationJob], None]) -> None:
        self.pool = pool
        self.ended: Counter[FinishReason] = Counter()
        self.tokens: Counter[str] = Counter()
        self._queue_size = queue_size
        self._finished = finished
        self._lanes: dict[Identity, Lane] = {}
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
        return sum(job.begun for lane in self._lanes.values() for job in [*lane.running, *lane.waiting])

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
            lane = self._next_lane()
            if lane is not None:
                self._guarded(lane, self._step)
        for lane in self._lanes.values():
            for job in [*lane.running, *lane.waiting]:
                self._end(job, "cancelled")

    def _receive(self) -> bool:
        """Take in what has arrived, waiting for it if there is nothing else to do; False once closed."""
        while True:
            with self._wake:
                while not (self._arrived or self._closing or self._lanes):
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
            if self._lanes:
                return True

    def _enqueue(self, job: GenerationJob) -> None:
        identity = job.adapters.ground.identity
        if identity not in self._lanes:
            # not 0: a newcomer would have every turn until it has caught up
            spent = min((lane.spent for lane in self._lanes.values()), default=0.0)
            self._lanes[identity] = Lane(job.adapters, spent=spent)
        self._lanes[identity].waiting.append(job)

    def _sweep(self) -> None:
        """End jobs that were cancelled or are out of time; forget lanes without jobs."""
        for identity, lane in list(self._lanes.items()):
            for job in [*lane.running, *lane.waiting]:
                reason = job.interruption
                if reason is not None:
                    self._leave(lane, job)
                    self._end(job, reason)
            if not lane.running and not lane.waiting:
                del self._lanes[identity]

    def _admit(self) -> None:
        """Let waiting jobs into their contexts, the lanes with the least time first."""
        for lane in sorted(self._lanes.values(), key=lambda lane: lane.spent):
            if lane.waiting:
                self._guarded(lane, self._fill)

    def _guarded(self, lane: Lane, work: Callable[[Lane], None]) -> None:
        """Whatever goes wrong in one lane ends the jobs of that lane only."""
        try:
            work(lane)
        except Exception as error:
            self._fail(lane, [*lane.running, *lane.waiting], error)

    def _fill(self, lane: Lane) -> None:
        """Start jobs of ``lane`` while there is a context and room in it."""
        if lane.context is None and not self._find_context(lane):
            return
        while lane.waiting and self._start(lane, lane.waiting[0]):
            lane.running.append(lane.waiting.popleft())

    def _find_context(self, lane: Lane) -> bool:
        """Give ``lane`` a context, if need be that of a lane whose slice is over; whether it has one."""
        context = self.pool.context_of(lane.adapters)
        if context is None:
            holders = [other for other in self._lanes.values() if other.context is not None]
            over = [other for other in holders if other.spent - other.since >= SLICE_SECONDS]
            if not over:
                return False
            self._suspend(max(over, key=lambda other: other.spent))
            context = self.pool.context_of(lane.adapters)
        lane.context, lane.since = context, lane.spent
        return context is not None

    def _suspend(self, lane: Lane) -> None:
        """Take a lane's context away; its jobs wait for their next turn."""
        for job in reversed(lane.running):
            self._save(lane, job)
            self._leave_slot(lane, job)
            lane.waiting.appendleft(job)
        lane.running.clear()
        lane.context = None

    def _save(self, lane: Lane, job: GenerationJob) -> None:
        """Keep what a job's slot holds, if there is memory for it; else it is computed again."""
        context, slot = lane.context, job.slot
        assert context is not None
        assert slot is not None
        kept = sum(len(job.saved.data) for other in self._lanes.values() for job in other.waiting if job.saved)
        if slot.held and kept + context.state_bytes(slot) <= self.pool.saved_bytes:
            job.saved = context.save(slot)

    def _start(self, lane: Lane, job: GenerationJob) -> bool:
        """Give ``job`` a slot of its lane's context, if there is one and room for it."""
        context = lane.context
        assert context is not None
        in_use = sum(len(running.keys) for running in lane.running)
        if lane.running and in_use + len(job.keys) + len(lane.running) + 1 > context.n_cells:
            return False
        slot = context.restore(job.saved) if job.saved else None
        slot = slot or context.take(job.keys)
        if slot is None:
            return False
        if not job.begun:
            with self._wake:
                self._queued -= 1
        job.start(slot)
        return True

    def _next_lane(self) -> Lane | None:
        running = [lane for lane in self._lanes.values() if lane.running]
        return min(running, key=lambda lane: lane.spent) if running else None

    def _step(self, lane: Lane) -> None:
        """Decode what is next of every job, and choose the next token of those whose turn has come."""
        started = time.perf_counter()
        for group in self._plan(lane):
            self._decode(lane, group)
        lane.spent += time.perf_counter() - started

    def _decode(self, lane: Lane, group: Sequence[tuple[GenerationJob, Chunk]]) -> None:
        context = lane.context
        assert context is not None
        chunks = [chunk for _, chunk in group]
        try:
            indices = iter(context.decode(chunks))
        except EngineError as error:
            self._fail(lane, [job for job, _ in group], error)
            return
        self.tokens["decoded"] += sum(len(chunk.keys) for chunk in chunks)
        for job, chunk in group:
            if chunk.wants_logits:
                self._advance(lane, job, context, next(indices))

    def _advance(self, lane: Lane, job: GenerationJob, context: Context, index: int) -> None:
        try:
            reason = job.advance(context, index)
        except EngineError as error:
            self._fail(lane, [job], error)
            return
        if reason is not None:
            self._leave(lane, job)
            self._end(job, reason)

    def _plan(self, lane: Lane) -> list[list[tuple[GenerationJob, Chunk]]]:
        """What to decode, by group: one token of each job that generates, then prompts in order of arrival."""
        context = lane.context
        assert context is not None
        generating = any(job.remaining == 1 for other in self._lanes.values() for job in other.running)
        budget = context.n_batch // _MIXED_SHARE if generating else context.n_batch
        budget = max(budget, len(lane.running))
        while True:
            plan, left = [], budget
            for job in sorted(lane.running, key=lambda job: job.remaining > 1):
                if left:
                    chunk = job.chunk(left)
                    plan.append((job, chunk))
                    left = max(left - len(chunk.keys), 0)
            if context.make_room(sum(len(chunk.keys) for _, chunk in plan)):
                return _grouped(plan)
            if len(lane.running) == 1:
                raise GenerationError("the context is full")
            newest = lane.running.pop()  # it waits until the others have done
            self._leave_slot(lane, newest)
            lane.waiting.appendleft(newest)

    def _leave(self, lane: Lane, job: GenerationJob) -> None:
        if job in lane.running:
            lane.running.remove(job)
            self._leave_slot(lane, job)
            if not lane.running:
                lane.context = None
        elif job in lane.waiting:
            lane.waiting.remove(job)
            if not job.begun:
                with self._wake:
                    self._queued -= 1

    @staticmethod
    def _leave_slot(lane: Lane, job: GenerationJob) -> None:
        if job.slot is not None and lane.context is not None:
            lane.context.release(job.slot)
        job.slot = None

    def _fail(self, lane: Lane, jobs: Sequence[GenerationJob], error: Exception) -> None:
        context = lane.context
        told = error if isinstance(error, EngineError) else GenerationError(f"computing the request failed: {error}")
        for job in jobs:
            if context is not None and job.slot is not None:
                context.keep(job.slot, 0)
            self._leave(lane, job)
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
