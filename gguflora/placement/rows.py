"""What is added to the rows of a tensor: the changes of all adapters that touch them, summed."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from gguflora.quants import kernels
from gguflora.quants.kernels import GgmlType
from gguflora.architectures import pieces_of
from gguflora.architectures.base_model import describe
from gguflora.adapters.deltas import (
    Change,
    LowRank,
    Replace,
    Values,
    WeightTimes,
    as_float64,
    sum_factors,
)
from gguflora.files.gguf import TOKEN_EMBEDDING, GgufFile, Shape, TensorEntry
from gguflora.placement.place import Placed

Scaled = tuple[Placed, float]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the output that is not just copied.

    Attributes:
        name: in the output.
        source: the base's tensor it is made from.
        shape: in the output; it may have more rows than its source, which begin as zeros.
        type: in the output.
        changes: what is added to it, each with its scale.
    """

    name: str
    source: TensorEntry
    shape: Shape
    type: GgmlType
    changes: Sequence[Scaled]

    @property
    def n_rows(self) -> int:
        """Number of rows, over all leading dimensions."""
        return math.prod(self.shape[:-1])


def target_of(file: GgufFile, name: str, items: Sequence[Placed]) -> Target:
    """The target of changes at scale 1; an output weight that the base does not have is made from the embedding."""
    source = file.tensors[name if name in file.tensors else TOKEN_EMBEDDING]
    return Target(name, source, source.shape, source.type, [(item, 1.0) for item in items])


class PreciseWeights(Protocol):
    """The base's weights before they were quantized."""

    def rows(self, tensor: str, first: int, last: int) -> Floats:
        """Values of a GGUF tensor's rows, leading dimensions flattened: (last - first, n_in)."""


class Weights:
    """Values that changes are added to: the base's own, dequantized, or better ones if those are at hand."""

    def __init__(self, base: GgufFile, precise: PreciseWeights | None = None) -> None:
        self.base = base
        self.is_precise = precise is not None
        self._precise = precise

    def values(self, tensor: TensorEntry, first: int, last: int) -> Values:
        """Rows of a tensor in float64; of a vector all of it, as one column."""
        if self._precise is None:
            return read_values(self.base, tensor, first, last)
        vector = len(tensor.shape) == 1
        values = self._precise_rows(tensor, *((0, 1) if vector else (first, last)))
        return (values.reshape(-1, 1) if vector else values).astype(np.float64)

    def stored(self, tensor: TensorEntry, rows: Bytes, first: int, last: int) -> tuple[Bytes, GgmlType]:
        """Rows of a tensor as bytes of some type, given the base's bytes of them."""
        if self._precise is None:
            return rows, tensor.type
        return np.ascontiguousarray(self._precise_rows(tensor, first, last)).view(np.uint8), kernels.type_named("F32")

    def _precise_rows(self, tensor: TensorEntry, first: int, last: int) -> Floats:
        assert self._precise is not None
        values = np.zeros((last - first, tensor.n_in), np.float32)
        known = min(last, tensor.n_rows)
        if first < known:
            values[: known - first] = self._precise.rows(tensor.name, first, known)
        return values


class WholeWeights:
    """Changes that need a whole Hugging Face weight at once, whose rows lie in any order and in several tensors."""

    def __init__(self, weights: Weights, targets: Sequence[Target]) -> None:
        self.weights = weights
        self._base = weights.base
        self._pieces: dict[int, list[tuple[Placed, TensorEntry]]] = {}
        for target in targets:
            for item, _ in target.changes:
                self._pieces.setdefault(id(item.change), []).append((item, target.source))
        self._lock = threading.Lock()
        self._deltas: dict[int, Values] = {}
        self._weight = ""

    def delta(self, change: Change) -> Values:
        """``W' - W`` of the whole weight; those of the last weight are kept, for the next block of rows."""
        with self._lock:
            pieces = self._pieces[id(change)]
            if self._weight != pieces[0][0].weight:
                self._weight = pieces[0][0].weight
                self._deltas.clear()  # free them before the next is made
            if id(change) not in self._deltas:
                weight = self._read(change.shape, pieces)
                known = change.given(self._layer_weight(change)) if isinstance(change, WeightTimes) else change
                self._deltas[id(change)] = known.delta(weight, np.arange(change.shape[0]))
            return self._deltas[id(change)]

    def _read(self, shape: tuple[int, int], pieces: Sequence[tuple[Placed, TensorEntry]]) -> Values:
        weight = np.zeros(shape)
        for item, tensor in pieces:
            first = item.piece.first
            item.put(self.weights.values(tensor, first, first + item.shape[0]), weight)
        return weight

    def _layer_weight(self, change: WeightTimes) -> Values:
        shape = change.shape[0], len(change.vector)
        zero = LowRank(np.zeros((0, shape[1])), np.zeros((shape[0], 0)), 0.0)
        pieces = [Placed(change.weight, zero, piece) for piece in pieces_of(describe(self._base), change.weight)]
        return self._read(shape, [(item, self._base.tensors[item.piece.tensor]) for item in pieces])


def read_values(base: GgufFile, tensor: TensorEntry, first: int, last: int) -> Values:
    """Rows of a tensor, leading dimensions flattened, in float64; of a vector all of it, as one column."""
    vector = len(tensor.shape) == 1
    first, last = (0, 1) if vector else (first, last)
    values = np.empty((last - first, tensor.n_in), np.float32)
    kernels.dequantize_rows(read_or_zeros(base, tensor, first, last), tensor.type, values)
    return (values.reshape(-1, 1) if vector else values).astype(np.float64)


def read_or_zeros(base: GgufFile, tensor: TensorEntry, first: int, last: int) -> Bytes:
    """Bytes of a tensor's rows; of rows beyond its last one zeros, which are zeros in every type."""
    if 0 < last <= tensor.n_rows and tensor.nbytes:
        return base.read_rows(tensor, first, last)
    rows = np.zeros((last - first, tensor.type.row_bytes(tensor.n_in)), np.uint8)
    if first < tensor.n_rows and tensor.nbytes:
        rows[: tensor.n_rows - first] = base.read_rows(tensor, first, tensor.n_rows)
    return rows


@dataclass(frozen=True, slots=True)
class LowRankRows:
    """Rows ``start`` to ``end`` of a tensor, to which ``b @ a`` is added."""

    start: int
    end: int
    a: Floats
    b: Floats

    def change(self, first: int, last: int) -> kernels.Product:
        """What is added to the rows ``first`` to ``last``."""
        return kernels.Product(self.a, self.b[first - self.start : last - self.start])


@dataclass(frozen=True, slots=True)
class AnyRows:
    """Rows ``start`` to ``end`` of a tensor, changed by any formulas, or by none."""

    tensor: TensorEntry
    start: int
    end: int
    changes: Sequence[Scaled]
    whole: WholeWeights

    def change(self, first: int, last: int) -> Values:
        """What is added to the rows ``first`` to ``last``; to a vector, as one column."""
        return self._sum(self.whole.weights.values(self.tensor, first, last), first)

    def _sum(self, stored: Values, first: int) -> Values:
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


def without_copies(base: GgufFile, placed: Mapping[str, Sequence[Placed]]) -> dict[str, list[Placed]]:
    """The changes without weights saved beside them only as a copy of the base's (PEFT: save_embedding_layers).

    A copy differs from the base's weights by no more than their quantization.
    """
    kept = {}
    for name, items in placed.items():
        tensor = base.tensors.get(name) or base.tensors[TOKEN_EMBEDDING]
        others = [item for item in items if not _is_copy(base, tensor, item.change)]
        if others:
            kept[name] = others
    return kept


def _is_copy(base: GgufFile, tensor: TensorEntry, change: Change) -> bool:
    if not isinstance(change, Replace) or not change.frozen or change.shape[0] > tensor.n_rows:
        return False
    difference = norm = 0.0
    step = max(1, (1 << 20) // tensor.n_in)
    for first in range(0, change.shape[0], step):
        values = as_float64(change.values[first : first + step])
        stored = read_values(base, tensor, first, first + len(values))
        difference += float(((values - stored) ** 2).sum())
        norm += float((values**2).sum())
    return difference <= _COPY_TOLERANCE.get(tensor.type.name, _QUANTIZED_TOLERANCE) ** 2 * norm


# relative differences that rounding to a type may make; 2-bit types lose about a third
_COPY_TOLERANCE: Final = {"F32": 1e-2, "F16": 1e-2, "BF16": 1e-2, "Q8_0": 2e-2}
_QUANTIZED_TOLERANCE: Final = 0.4


def split_rows(target: Target, whole: WholeWeights, period: int | None = None) -> Iterator[LowRankRows | AnyRows]:
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


def _low_rank_of(changes: Sequence[Scaled], start: int, end: int) -> tuple[Floats, Floats] | None:
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
