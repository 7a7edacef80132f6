"""The base's weights that deltas are added to: its own, dequantized, or those of an unquantized base."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gguflora.adapters.deltas import BiasFromWeight, Delta, LowRank
from gguflora.architectures.base_model import describe
from gguflora.architectures.mapping import slices_of
from gguflora.files.gguf import GgufFile, TensorEntry
from gguflora.placement.place import PlacedDelta
from gguflora.placement.target import ChangedTensor
from gguflora.quants import kernels
from gguflora.quants.arrays import Bytes, Float32Array, Float64Array
from gguflora.quants.types import GgmlType, type_named


class UnquantizedRows(Protocol):
    """The base's weights before they were quantized."""

    def rows(self, tensor: str, first: int, last: int) -> Float32Array:
        """Values of a GGUF tensor's rows, leading dimensions flattened: (last - first, n_in)."""


class BaseTensors:
    """Values that changes are added to: the base's own, dequantized, or better ones if those are at hand."""

    def __init__(self, base: GgufFile, precise: UnquantizedRows | None = None) -> None:
        self.base = base
        self.is_precise = precise is not None
        self._precise = precise

    def values(self, tensor: TensorEntry, first: int, last: int) -> Float64Array:
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
        return np.ascontiguousarray(self._precise_rows(tensor, first, last)).view(np.uint8), type_named("F32")

    def _precise_rows(self, tensor: TensorEntry, first: int, last: int) -> Float32Array:
        assert self._precise is not None
        values = np.zeros((last - first, tensor.n_in), np.float32)
        known = min(last, tensor.n_rows)
        if first < known:
            values[: known - first] = self._precise.rows(tensor.name, first, known)
        return values


class WholeTensorDeltas:
    """Changes that need a whole Hugging Face weight at once, whose rows lie in any order and in several tensors."""

    def __init__(self, weights: BaseTensors, targets: Sequence[ChangedTensor]) -> None:
        self.weights = weights
        self._base = weights.base
        self._pieces: dict[int, list[tuple[PlacedDelta, TensorEntry]]] = {}
        for target in targets:
            for item, _ in target.changes:
                self._pieces.setdefault(id(item.change), []).append((item, target.source))
        self._lock = threading.Lock()
        self._deltas: dict[int, Float64Array] = {}
        self._weight = ""

    def delta(self, change: Delta) -> Float64Array:
        """``W' - W`` of the whole weight; those of the last weight are kept, for the next block of rows."""
        with self._lock:
            pieces = self._pieces[id(change)]
            if self._weight != pieces[0][0].weight:
                self._weight = pieces[0][0].weight
                self._deltas.clear()  # free them before the next is made
            if id(change) not in self._deltas:
                weight = self._read(change.shape, pieces)
                known = change.given(self._layer_weight(change)) if isinstance(change, BiasFromWeight) else change
                self._deltas[id(change)] = known.delta(weight, np.arange(change.shape[0]))
            return self._deltas[id(change)]

    def _read(self, shape: tuple[int, int], pieces: Sequence[tuple[PlacedDelta, TensorEntry]]) -> Float64Array:
        weight = np.zeros(shape)
        for item, tensor in pieces:
            first = item.piece.first
            item.put(self.weights.values(tensor, first, first + item.shape[0]), weight)
        return weight

    def _layer_weight(self, change: BiasFromWeight) -> Float64Array:
        shape = change.shape[0], len(change.vector)
        zero = LowRank(np.zeros((0, shape[1])), np.zeros((shape[0], 0)), 0.0)
        pieces = [PlacedDelta(change.weight, zero, piece) for piece in slices_of(describe(self._base), change.weight)]
        return self._read(shape, [(item, self._base.tensors[item.piece.tensor]) for item in pieces])


def read_values(base: GgufFile, tensor: TensorEntry, first: int, last: int) -> Float64Array:
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
