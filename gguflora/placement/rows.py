"""What is added to the rows of a tensor: the changes of all adapters that touch them, summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gguflora.adapters.deltas import LowRank, sum_factors
from gguflora.files.gguf import TensorEntry
from gguflora.placement.base_weights import WholeTensorDeltas
from gguflora.placement.target import ChangedTensor, ScaledDelta
from gguflora.quants import kernels
from gguflora.quants.arrays import Float32Array, Float64Array


@dataclass(frozen=True, slots=True)
class LowRankRows:
    """Rows ``start`` to ``end`` of a tensor, to which ``b @ a`` is added."""

    start: int
    end: int
    a: Float32Array
    b: Float32Array

    def change(self, first: int, last: int) -> kernels.Product:
        """What is added to the rows ``first`` to ``last``."""
        return kernels.Product(self.a, self.b[first - self.start : last - self.start])


@dataclass(frozen=True, slots=True)
class AnyRows:
    """Rows ``start`` to ``end`` of a tensor, changed by any formulas, or by none."""

    tensor: TensorEntry
    start: int
    end: int
    changes: Sequence[ScaledDelta]
    whole: WholeTensorDeltas

    def change(self, first: int, last: int) -> Float64Array:
        """What is added to the rows ``first`` to ``last``; to a vector, as one column."""
        return self._sum(self.whole.weights.values(self.tensor, first, last), first)

    def _sum(self, stored: Float64Array, first: int) -> Float64Array:
        total = np.zeros_like(stored)
        for item, scale in self.changes:
            start = max(item.piece.first - first, 0)  # row of the block with which the piece begins
            inner = max(first - item.piece.first, 0)  # row of the piece with which the block begins
            count = max(min(len(stored) - start, item.shape[0] - inner), 0)
            here, there = slice(start, start + count), slice(inner, inner + count)
            if item.by_rows:
                total[here] += scale * item.delta(stored[here], inner)
            else:
                total[here] += scale * item.take(self.whole.delta(item.change))[there]
        return total


def split_rows(
    target: ChangedTensor, whole: WholeTensorDeltas, period: int | None = None
) -> Iterator[LowRankRows | AnyRows]:
    """The rows of a target in ranges with the same changes throughout (the experts of a stack, for example).

    With a period, no range reaches over a multiple of so many rows.
    """
    tensor = target.source
    if len(tensor.shape) == 1:
        yield AnyRows(tensor, 0, 1, target.changes, whole)
        return
    edges = {0, target.n_rows, *(range(0, target.n_rows, period) if period else ())}
    for item, _ in target.changes:
        edges |= {item.piece.first, min(item.piece.first + item.shape[0], target.n_rows)}
    bounds = sorted(edges)
    for start, end in pairwise(bounds):
        changes = [
            (item, scale)
            for item, scale in target.changes
            if item.piece.first <= start and end <= item.piece.first + item.shape[0]
        ]
        factors = _low_rank_of(changes, start, end)
        if factors:
            yield LowRankRows(start, end, *factors)
        else:
            yield AnyRows(tensor, start, end, changes, whole)


def _low_rank_of(changes: Sequence[ScaledDelta], start: int, end: int) -> tuple[Float32Array, Float32Array] | None:
    """Factors a, b of the sum of the changes of some rows, if all are of low rank."""
    parts: list[tuple[LowRank, float]] = []
    for item, scale in changes:
        change = item.low_rank()
        if change is None:
            return None
        rows = np.arange(start - item.piece.first, end - item.piece.first)
        whole = item.piece.first == start and item.shape[0] == end - start
        parts.append((change if whole else change.at(rows, None), scale))
    return sum_factors(parts) if parts else None
