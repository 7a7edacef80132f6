"""Sum the deltas of all adapters for ranges of a tensor's rows."""

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
    """Rows ``start`` to ``stop`` of a tensor, to which ``b @ a`` is added.

    Attributes:
        start: first row.
        stop: row after the last.
        a: (rank, n_in).
        b: (stop - start, rank), with all scales multiplied in.
    """

    start: int
    stop: int
    a: Float32Array
    b: Float32Array

    def delta(self, start: int, stop: int) -> kernels.Product:
        """Return the sum of the deltas for the rows ``start`` to ``stop``, as a product of factors."""
        return kernels.Product(self.a, self.b[start - self.start : stop - self.start])


@dataclass(frozen=True, slots=True)
class AnyRows:
    """Rows ``start`` to ``stop`` of a tensor with deltas of any kind, or none.

    Attributes:
        tensor: the base's tensor.
        start: first row.
        stop: row after the last.
        deltas: the deltas of these rows, each with its scale.
        whole: computes deltas that need whole weights.
    """

    tensor: TensorEntry
    start: int
    stop: int
    deltas: Sequence[ScaledDelta]
    whole: WholeTensorDeltas

    def delta(self, start: int, stop: int) -> Float64Array:
        """Return the sum of the deltas for the rows ``start`` to ``stop``; for a vector, as one column."""
        return self._sum(self.whole.weights.values(self.tensor, start, stop), start)

    def _sum(self, stored: Float64Array, start: int) -> Float64Array:
        total = np.zeros_like(stored)
        for item, scale in self.deltas:
            outer = max(item.tensor_slice.start - start, 0)  # row of the block where the slice starts
            inner = max(start - item.tensor_slice.start, 0)  # row of the slice where the block starts
            count = max(min(len(stored) - outer, item.shape[0] - inner), 0)
            here, there = slice(outer, outer + count), slice(inner, inner + count)
            if item.by_rows:
                total[here] += scale * item.compute(stored[here], inner)
            else:
                total[here] += scale * item.take(self.whole.compute(item.delta))[there]
        return total


def split_rows(
    target: ChangedTensor, whole: WholeTensorDeltas, period: int | None = None
) -> Iterator[LowRankRows | AnyRows]:
    """Split the rows of a tensor into ranges in which all rows have the same deltas, such as the experts of a stack.

    Args:
        target: the tensor and its deltas.
        whole: computes deltas that need whole weights.
        period: if given, ranges are also split at all multiples of this number of rows.
    """
    tensor = target.source
    if len(tensor.shape) == 1:
        yield AnyRows(tensor, 0, 1, target.deltas, whole)
        return
    edges = {0, target.n_rows, *(range(0, target.n_rows, period) if period else ())}
    for item, _ in target.deltas:
        edges |= {item.tensor_slice.start, min(item.tensor_slice.start + item.shape[0], target.n_rows)}
    bounds = sorted(edges)
    for start, stop in pairwise(bounds):
        deltas = [
            (item, scale)
            for item, scale in target.deltas
            if item.tensor_slice.start <= start and stop <= item.tensor_slice.start + item.shape[0]
        ]
        factors = _sum_low_rank(deltas, start, stop)
        if factors:
            yield LowRankRows(start, stop, *factors)
        else:
            yield AnyRows(tensor, start, stop, deltas, whole)


def _sum_low_rank(deltas: Sequence[ScaledDelta], start: int, stop: int) -> tuple[Float32Array, Float32Array] | None:
    """Return factors a, b of the sum of the deltas of some rows, or None if not all deltas are low-rank."""
    parts: list[tuple[LowRank, float]] = []
    for item, scale in deltas:
        delta = item.low_rank()
        if delta is None:
            return None
        rows = np.arange(start - item.tensor_slice.start, stop - item.tensor_slice.start)
        whole = item.tensor_slice.start == start and item.shape[0] == stop - start
        parts.append((delta if whole else delta.at(rows, None), scale))
    return sum_factors(parts) if parts else None
