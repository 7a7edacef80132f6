"""Which samples make a step, in which order, and how a step is split into what is computed at once.

All of it follows from the seed and the number of the step, so that a run that goes on later sees the same.

Short samples share a row with others. Positions begin again at 0 with each of them; by that transformers makes the mask
that keeps a sample's tokens from attending to another's (``masking_utils.find_packed_sequence_indices``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Final

import torch

from gguflora.training.samples import Sample

_PADDING: Final = 64
"""Positions of padding that cost as much as to compute a micro-batch more: its weights are dequantized once more."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample lies in a micro-batch.

    Attributes:
        number: number of the sample.
        row: row of the micro-batch that holds it.
        start: its first position there.
        stop: the position after its last.
    """

    number: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples that are computed together.

    Attributes:
        tokens: (n_rows, n_positions), padded at the end with token 0.
        trained: same shape as the tokens; never the first token of a sample.
        sources: where the samples come from.
        places: where each sample lies.
        positions: same shape as the tokens: each token's position in its sample; None if every row holds one sample.
    """

    tokens: torch.Tensor
    trained: torch.Tensor
    sources: tuple[str, ...]
    places: tuple[Place, ...]
    positions: torch.Tensor | None = None

    @property
    def n_trained(self) -> int:
        """Learned tokens."""
        return int(self.trained.sum())


class Batches:
    """The steps of a run.

    Args:
        samples: to learn.
        batch: samples of a step.
        seed: of their order, which is another in every epoch.
        limit: positions of a micro-batch, padding included, at most (a longer sample is alone).
        accumulate: number of micro-batches in a step, in place of ``limit``.
        packs: whether several samples may share a row.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        batch: int,
        seed: int,
        limit: int,
        accumulate: int | None = None,
        *,
        packs: bool = True,
    ) -> None:
        self._samples, self._batch, self._seed, self._packs = samples, batch, seed, packs
        self._limit, self._accumulate = limit, accumulate
        self.steps_per_epoch = -(-len(samples) // batch)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._samples)))
        Random(f"{self._seed} {epoch}").shuffle(order)  # noqa: S311  (an order, no secret)
        return order

    def step(self, number: int) -> list[MicroBatch]:
        """The micro-batches of one step, from 0: rows of like length together."""
        epoch, within = divmod(number, self.steps_per_epoch)
        return self.of(self._order(epoch)[within * self._batch : (within + 1) * self._batch])

    def all(self) -> list[MicroBatch]:
        """Every sample once, in micro-batches that no step has to share."""
        return self._limited(range(len(self._samples)))

    def of(self, numbers: Sequence[int]) -> list[MicroBatch]:
        """The micro-batches of some samples."""
        if self._accumulate is None:
            return self._limited(numbers)
        ordered = sorted(numbers, key=self._length)
        size = -(-len(ordered) // self._accumulate)
        return [self._laid(self._rows(ordered[at : at + size])) for at in range(0, len(ordered), size)]

    def _limited(self, numbers: Sequence[int]) -> list[MicroBatch]:
        groups: list[list[list[int]]] = []
        longest = 0
        for row in sorted(self._rows(numbers), key=self._row_length):  # the longest of a group is its last
            length = self._row_length(row)
            fits = groups and (len(groups[-1]) + 1) * length <= self._limit
            if fits and (length - longest) * len(groups[-1]) <= _PADDING:
                groups[-1].append(row)
            else:
                groups.append([row])
            longest = length
        return [self._laid(group) for group in groups]

    def _length(self, number: int) -> int:
        return len(self._samples[number].tokens)

    def _row_length(self, row: Sequence[int]) -> int:
        return sum(map(self._length, row))

    def _rows(self, numbers: Sequence[int]) -> list[list[int]]:
        """Samples that share rows no longer than the longest sample: first fit, the longest first."""
        ordered = sorted(numbers, key=self._length, reverse=True)
        if not self._packs or not ordered:
            return [[number] for number in ordered]
        rows: list[list[int]] = []
        left: list[int] = []
        for number in ordered:
            length = self._length(number)
            row = next((at for at, room in enumerate(left) if room >= length), len(rows))
            if row == len(rows):
                rows.append([])
                left.append(self._length(ordered[0]))
            rows[row].append(number)
            left[row] -= length
        return rows

    def _laid(self, rows: Sequence[Sequence[int]]) -> MicroBatch:
        places = []
        for row, numbers in enumerate(rows):
            start = 0
            for number in numbers:
                places.append(Place(number, row, start, start + self._length(number)))
                start += self._length(number)
        return laid_out([self._samples[place.number] for place in places], places)


def padded(samples: Sequence[Sample]) -> MicroBatch:
    """Samples below each other."""
    return laid_out(samples, [Place(row, row, 0, len(sample.tokens)) for row, sample in enumerate(samples)])


def laid_out(samples: Sequence[Sample], places: Sequence[Place]) -> MicroBatch:
    """Samples at their places."""
    shape = (max(place.row for place in places) + 1, max(place.stop for place in places))
    tokens, trained = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    positions = torch.arange(shape[1]).repeat(shape[0], 1)
    for sample, place in zip(samples, places, strict=True):
        tokens[place.row, place.start : place.stop] = torch.tensor(sample.tokens)
        trained[place.row, place.start + 1 : place.stop] = torch.tensor(sample.trained[1:], dtype=torch.bool)
        positions[place.row, place.start :] = torch.arange(shape[1] - place.start)
    is_packed = any(place.start for place in places)
    sources = tuple(sample.source for sample in samples)
    return MicroBatch(tokens, trained, sources, tuple(places), positions if is_packed else None)
