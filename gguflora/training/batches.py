"""Which samples make a step, in which order, and how a step is split into what is computed at once.

All of it follows from the seed and the number of the step, so that a run that goes on later sees the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import torch

from gguflora.training.samples import Sample


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples that are computed together.

    Attributes:
        tokens: (n_samples, n_positions), padded at the end with token 0.
        trained: same shape as the tokens.
        sources: where the samples come from.
    """

    tokens: torch.Tensor
    trained: torch.Tensor
    sources: tuple[str, ...]

    @property
    def n_trained(self) -> int:
        """Learned tokens."""
        return int(self.trained[:, 1:].sum())


class Batches:
    """The steps of a run.

    Args:
        samples: to learn.
        batch: samples of a step.
        seed: of their order, which is another in every epoch.
        limit: positions of a micro-batch, padding included, at most (a longer sample is alone).
        accumulate: number of micro-batches of a step, in place of ``limit``.
    """

    def __init__(
        self, samples: Sequence[Sample], batch: int, seed: int, limit: int, accumulate: int | None = None
    ) -> None:
        self._samples, self._batch, self._seed = samples, batch, seed
        self._limit, self._accumulate = limit, accumulate
        self.steps_per_epoch = -(-len(samples) // batch)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._samples)))
        Random(f"{self._seed} {epoch}").shuffle(order)  # noqa: S311  (an order, no secret)
        return order

    def step(self, number: int) -> list[MicroBatch]:
        """The micro-batches of one step, from 0: samples of like length together."""
        epoch, within = divmod(number, self.steps_per_epoch)
        chosen = self._order(epoch)[within * self._batch : (within + 1) * self._batch]
        samples = sorted((self._samples[index] for index in chosen), key=lambda sample: len(sample.tokens))
        return [padded(group) for group in self._groups(samples)]

    def _groups(self, samples: list[Sample]) -> list[list[Sample]]:
        if self._accumulate is not None:
            size = -(-len(samples) // self._accumulate)
            return [samples[at : at + size] for at in range(0, len(samples), size)]
        groups: list[list[Sample]] = []
        for sample in samples:  # the longest of a group is its last
            if groups and (len(groups[-1]) + 1) * len(sample.tokens) <= self._limit:
                groups[-1].append(sample)
            else:
                groups.append([sample])
        return groups


def padded(samples: Sequence[Sample]) -> MicroBatch:
    """Samples below each other."""
    longest = max(len(sample.tokens) for sample in samples)
    tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
    trained = torch.zeros(len(samples), longest, dtype=torch.bool)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
        trained[row, : len(sample.tokens)] = torch.tensor(sample.trained)
    return MicroBatch(tokens, trained, tuple(sample.source for sample in samples))
