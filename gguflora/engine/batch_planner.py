"""Which tokens are decoded next, and in which batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gguflora.engine.batch_costs import BatchCosts
from gguflora.engine.context import MAX_SCORED
from gguflora.engine.job import GenerationJob
from gguflora.engine.registry import ResolvedSet
from gguflora.engine.slots import Chunk
from gguflora.runtime.mixed_adapters import MAX_BAYS, MixedAdapters

_MIXED_SHARE: Final = 4
"""While requests generate, prompts may use only 1/4 of a batch, so that the generating requests do not wait long."""

_TURN_SECONDS: Final = 0.05
"""A set that cannot be mixed keeps its turn for so long: applying other adapters takes llama.cpp a moment."""

_SINGLE_STEPS: Final = 8
"""After so many steps of one set alone its adapters are applied without the stack, which takes a moment and is cheaper
from then on."""


@dataclass(slots=True, eq=False)
class AdapterQueue:
    """All requests of one adapter set.

    Attributes:
        adapters: the adapter set.
        waiting: jobs without a slot, in order.
        running: jobs with a slot, in order.
        spent: seconds of computing; the queue with the least comes next.
        since: value of `spent` when its jobs got their slots.
    """

    adapters: ResolvedSet
    waiting: deque[GenerationJob] = field(default_factory=deque)
    running: list[GenerationJob] = field(default_factory=list)
    spent: float = 0.0
    since: float = 0.0

    @property
    def jobs(self) -> list[GenerationJob]:
        """All of them."""
        return [*self.running, *self.waiting]


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """Chunks to decode in one batch.

    Attributes:
        chunks: the chunks and their jobs.
        mixed: whether to apply to each chunk only its own LoRAs; otherwise all chunks have the same.
    """

    chunks: Sequence[tuple[GenerationJob, Chunk]]
    mixed: bool

    @property
    def n_tokens(self) -> int:
        """Number of positions."""
        return sum(len(chunk.keys) for _, chunk in self.chunks)

    @property
    def n_sets(self) -> int:
        """Number of different LoRAs and scales."""
        return len({chunk.parts for _, chunk in self.chunks})

    def by_set(self) -> list[PlannedBatch]:
        """Return a batch for each of the different LoRAs and scales."""
        return [PlannedBatch(each, mixed=False) for each in _by_parts(self.chunks)]


class BatchPlanner:
    """Plans the batches of a scheduler.

    Args:
        n_batch: largest number of tokens in one batch.
        mixed: applies several adapter sets in one batch.
    """

    def __init__(self, n_batch: int, mixed: MixedAdapters) -> None:
        self._n_batch = n_batch
        self._mixed = mixed
        self._turn: AdapterQueue | None = None
        self._n_single = 0
        self._costs = BatchCosts()

    def plan(self, queues: Sequence[AdapterQueue]) -> list[PlannedBatch]:
        """Return the batches of the next step; none if nothing runs."""
        running = [queue for queue in queues if queue.running]
        if not running:
            return []
        first = min(running, key=lambda queue: queue.spent)
        if self._turn in running and self._turn.spent - first.spent < _TURN_SECONDS:
            first = self._turn
        self._turn = first
        jobs = self._jobs_beside(first, running)
        generating = any(job.remaining == 1 for queue in running for job in queue.running)
        budget = max(self._n_batch // _MIXED_SHARE if generating else self._n_batch, len(jobs))
        chunks = []
        scores = MAX_SCORED
        for job in sorted(jobs, key=lambda job: job.remaining > 1):
            limit = min(budget, scores) if job.is_scoring else budget
            if limit:
                chunk = job.chunk(limit)
                chunks.append((job, chunk))
                budget = max(budget - len(chunk.keys), 0)
                scores = max(scores - len(chunk.keys), 0) if chunk.wants_all_logits else scores
        return [batch for kind in _by_kind(chunks) for batch in self._batches(kind)]

    def note(self, batch: PlannedBatch, seconds: float) -> None:
        """Learn from the time that a batch took."""
        self._costs.note(batch.n_tokens, seconds, stacked=batch.mixed)

    def _jobs_beside(self, first: AdapterQueue, running: Sequence[AdapterQueue]) -> list[GenerationJob]:
        """Jobs that may be decoded in the same step as those of ``first``."""
        if not self._mixes(first):
            return first.running
        queues = sorted(running, key=lambda queue: queue.spent)
        return [job for queue in queues if self._mixes(queue) for job in queue.running]

    def _mixes(self, queue: AdapterQueue) -> bool:
        return all(self._mixed.can_mix(job.all_parts) for job in queue.running)

    def _batches(self, chunks: Sequence[tuple[GenerationJob, Chunk]]) -> list[PlannedBatch]:
        """Batches of chunks of one kind."""
        sets = _by_parts(chunks)
        can_mix = chunks[0][1].kind is list and all(self._mixed.can_mix(chunk.phase.parts) for _, chunk in chunks)
        if not can_mix:
            return [PlannedBatch(each, mixed=False) for each in sets]
        self._n_single = self._n_single + 1 if len(sets) == 1 else 0
        if len(sets) == 1:
            n_tokens = PlannedBatch(chunks, mixed=False).n_tokens
            stays = self._mixed.in_force and self._n_single <= _SINGLE_STEPS and not self._costs.is_long(n_tokens)
            return [PlannedBatch(chunks, mixed=stays)]
        alone = [batch for batch in map(_of_one_set, sets) if self._costs.is_cheaper_alone(batch.n_tokens)]
        beside = [each for each in sets if not any(batch.chunks is each for batch in alone)]
        return [*alone, *self._mixed_batches(beside)]

    def _mixed_batches(self, sets: Sequence[list[tuple[GenerationJob, Chunk]]]) -> list[PlannedBatch]:
        """As few batches as the bays of the largest stack allow."""
        batches: list[list[list[tuple[GenerationJob, Chunk]]]] = []
        for each in sets:
            for batch in batches:
                parts = [other[0][1].phase.parts for other in [*batch, each]]
                if self._mixed.n_bays(parts) <= MAX_BAYS:
                    batch.append(each)
                    break
            else:
                batches.append([each])
        return [_planned(batch) for batch in batches]


def _of_one_set(chunks: Sequence[tuple[GenerationJob, Chunk]]) -> PlannedBatch:
    return PlannedBatch(chunks, mixed=False)


def _planned(sets: Sequence[Sequence[tuple[GenerationJob, Chunk]]]) -> PlannedBatch:
    return PlannedBatch([entry for each in sets for entry in each], mixed=len(sets) > 1)


def _by_parts(chunks: Sequence[tuple[GenerationJob, Chunk]]) -> list[list[tuple[GenerationJob, Chunk]]]:
    sets: dict[object, list[tuple[GenerationJob, Chunk]]] = {}
    for job, chunk in chunks:
        sets.setdefault(chunk.parts, []).append((job, chunk))
    return list(sets.values())


def _by_kind(chunks: Sequence[tuple[GenerationJob, Chunk]]) -> list[list[tuple[GenerationJob, Chunk]]]:
    kinds: dict[type, list[tuple[GenerationJob, Chunk]]] = {}
    for job, chunk in chunks:
        kinds.setdefault(chunk.kind, []).append((job, chunk))
    return list(kinds.values())
