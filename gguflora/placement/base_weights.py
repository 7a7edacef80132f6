"""The values to which deltas are added: the base's own, dequantized, or those of an unquantized base."""

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
        """Return rows of a GGUF tensor with its leading dimensions flattened: (stop - start, n_in)."""


class BaseTensors:
    """The values to which deltas are added.

    Args:
        base: the base.
        precise: the weights before quantization; by default the base's own, dequantized, are used.

    Attributes:
        base: the base.
        is_precise: whether the values are those before quantization.
    """

    def __init__(self, base: GgufFile, precise: UnquantizedRows | None = None) -> None:
        self.base = base
        self.is_precise = precise is not None
        self._precise = precise

    def values(self, tensor: TensorEntry, start: int, stop: int) -> Float64Array:
        """Return rows of a tensor as float64 (stop - start, n_in); a vector is returned whole, as one column."""
        if self._precise is None:
            return read_values(self.base, tensor, start, stop)
        vector = len(tensor.shape) == 1
        values = self._precise_rows(tensor, *((0, 1) if vector else (start, stop)))
        return (values.reshape(-1, 1) if vector else values).astype(np.float64)

    def stored(self, tensor: TensorEntry, rows: Bytes, start: int, stop: int) -> tuple[Bytes, GgmlType]:
        """Return rows of a tensor as bytes, and their type: the base's bytes, or F32 of the unquantized weights.

        Args:
            tensor: the tensor.
            rows: the base's bytes of the rows.
            start: first row.
            stop: row after the last.
        """
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
    """Computes deltas that need a whole Hugging Face weight, whose rows may lie in several tensors in any order.

    Args:
        weights: the base's values.
        targets: all tensors that the deltas change.
    """

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
        """Return ``W' - W`` of the whole weight. The results for the last weight are cached for its other rows."""
        with self._lock:
            slices = self._slices[id(delta)]
            if self._weight != slices[0][0].weight:
                self._weight = slices[0][0].weight
                self._deltas.clear()  # free the memory before computing the next
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
            for tensor_slice in slices_of(describe(self._base, mmproj=True), delta.weight)
        ]
        return self._read(shape, [(item, self._base.tensors[item.tensor_slice.tensor]) for item in slices])


def read_values(base: GgufFile, tensor: TensorEntry, start: int, stop: int) -> Float64Array:
    """Dequantize rows of a tensor to float64 (stop - start, n_in); a vector is returned whole, as one column."""
    vector = len(tensor.shape) == 1
    start, stop = (0, 1) if vector else (start, stop)
    values = np.empty((stop - start, tensor.n_in), np.float32)
    kernels.dequantize_rows(read_or_zeros(base, tensor, start, stop), tensor.type, values)
    return (values.reshape(-1, 1) if vector else values).astype(np.float64)


def read_or_zeros(base: GgufFile, tensor: TensorEntry, start: int, stop: int) -> Bytes:
    """Read the bytes of rows of a tensor. Rows after the last one are zero bytes, which mean 0 in every quant type."""
    if 0 < stop <= tensor.n_rows and tensor.nbytes:
        return base.read_rows(tensor, start, stop)
    rows = np.zeros((stop - start, tensor.type.row_bytes(tensor.n_in)), np.uint8)
    if start < tensor.n_rows and tensor.nbytes:
        rows[: tensor.n_rows - start] = base.read_rows(tensor, start, tensor.n_rows)
    return rows
