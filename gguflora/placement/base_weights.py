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

    def rows(self, tensor: str, start: int, stop: int) -> Float32Array:
        """Values of a GGUF tensor's rows, leading dimensions flattened: (stop - start, n_in)."""


class BaseTensors:
    """Values that changes are added to: the base's own, dequantized, or better ones if those are at hand."""

    def __init__(self, base: GgufFile, precise: UnquantizedRows | None = None) -> None:
        self.base = base
        self.is_precise = precise is not None
        self._precise = precise

    def values(self, tensor: TensorEntry, start: int, stop: int) -> Float64Array:
        """Rows of a tensor in float64; of a vector all of it, as one column."""
        if self._precise is None:
            return read_values(self.base, tensor, start, stop)
        vector = len(tensor.shape) == 1
        values = self._precise_rows(tensor, *((0, 1) if vector else (start, stop)))
        return (values.reshape(-1, 1) if vector else values).astype(np.float64)

    def stored(self, tensor: TensorEntry, rows: Bytes, start: int, stop: int) -> tuple[Bytes, GgmlType]:
        """Rows of a tensor as bytes of some type, given the base's bytes of them."""
        if self._precise is None:
            return rows, tensor.type
        return np.ascontiguousarray(self._precise_rows(tensor, start, stop)).view(np.uint8), type_named("F32")

    def _precise_rows(self, tensor: TensorEntry, start: int, stop: int) -> Float32Array:
        assert self._precise is not None
        values = np.zeros((stop - start, tensor.n_in), np.float32)
        known = min(stop, tensor.n_rows)
        if start < known:
            values[: known - start] = self._precise.rows(tensor.name, start, known)
        return values


class WholeTensorDeltas:
    """Changes that need a whole Hugging Face weight at once, whose rows lie in any order and in several tensors."""

    def __init__(self, weights: BaseTensors, targets: Sequence[ChangedTensor]) -> None:
        self.weights = weights
        self._base = weights.base
        self._slices: dict[int, list[tuple[PlacedDelta, TensorEntry]]] = {}
        for target in targets:
            for item, _ in target.deltas:
                self._slices.setdefault(id(item.delta), []).append((item, target.source))
        self._lock = threading.Lock()
        self._deltas: dict[int, Float64Array] = {}
        self._weight = ""

    def compute(self, delta: Delta) -> Float64Array:
        """``W' - W`` of the whole weight; those of the last weight are kept, for the next block of rows."""
        with self._lock:
            slices = self._slices[id(delta)]
            if self._weight != slices[0][0].weight:
                self._weight = slices[0][0].weight
                self._deltas.clear()  # free them before the next is made
            if id(delta) not in self._deltas:
                weight = self._read(delta.shape, slices)
                known = delta.given(self._layer_weight(delta)) if isinstance(delta, BiasFromWeight) else delta
                self._deltas[id(delta)] = known.compute(weight, np.arange(delta.shape[0]))
            return self._deltas[id(delta)]

    def _read(self, shape: tuple[int, int], slices: Sequence[tuple[PlacedDelta, TensorEntry]]) -> Float64Array:
        weight = np.zeros(shape)
        for item, tensor in slices:
            start = item.tensor_slice.start
            item.put(self.weights.values(tensor, start, start + item.shape[0]), weight)
        return weight

    def _layer_weight(self, delta: BiasFromWeight) -> Float64Array:
        shape = delta.shape[0], len(delta.vector)
        zero = LowRank(np.zeros((0, shape[1])), np.zeros((shape[0], 0)), 0.0)
        slices = [
            PlacedDelta(delta.weight, zero, tensor_slice)
            for tensor_slice in slices_of(describe(self._base), delta.weight)
        ]
        return self._read(shape, [(item, self._base.tensors[item.tensor_slice.tensor]) for item in slices])


def read_values(base: GgufFile, tensor: TensorEntry, start: int, stop: int) -> Float64Array:
    """Rows of a tensor, leading dimensions flattened, in float64; of a vector all of it, as one column."""
    vector = len(tensor.shape) == 1
    start, stop = (0, 1) if vector else (start, stop)
    values = np.empty((stop - start, tensor.n_in), np.float32)
    kernels.dequantize_rows(read_or_zeros(base, tensor, start, stop), tensor.type, values)
    return (values.reshape(-1, 1) if vector else values).astype(np.float64)


def read_or_zeros(base: GgufFile, tensor: TensorEntry, start: int, stop: int) -> Bytes:
    """Bytes of a tensor's rows; of rows beyond its last one zeros, which are zeros in every type."""
    if 0 < stop <= tensor.n_rows and tensor.nbytes:
        return base.read_rows(tensor, start, stop)
    rows = np.zeros((stop - start, tensor.type.row_bytes(tensor.n_in)), np.uint8)
    if start < tensor.n_rows and tensor.nbytes:
        rows[: tensor.n_rows - start] = base.read_rows(tensor, start, tensor.n_rows)
    return rows
