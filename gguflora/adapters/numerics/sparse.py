"""Add values to single elements of a weight."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from gguflora.adapters.deltas import FunctionDelta, as_float64
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices


def add_sparse(
    where: str, shape: tuple[int, int], rows: NDArray[np.int64], columns: NDArray[np.int64], values: Array
) -> FunctionDelta:
    """Return the delta that adds ``values[k]`` at (rows[k], columns[k]); values for the same element are summed.

    Args:
        where: start of an error message: adapter and module.
        shape: shape (n_out, n_in) of the weight.
        rows: row numbers, (n,).
        columns: column numbers, (n,).
        values: values to add, (n,).

    Raises:
        AdapterError: if an index lies outside the shape.
    """
    for axis, numbers, size in (("row", rows, shape[0]), ("column", columns, shape[1])):
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < size):
            raise AdapterError(
                f"{where}: a {axis} index is {numbers.min()} or {numbers.max()}, expected 0 to {size - 1}: the adapter "
                "was made for another base"
            )
    order = np.argsort(rows, kind="stable")
    return FunctionDelta(shape, partial(_add, rows[order], columns[order], values[order]))


def _add(
    sorted_rows: NDArray[np.int64], columns: NDArray[np.int64], values: Array, w: Float64Array, rows: Indices
) -> Float64Array:
    delta = np.zeros_like(w)
    starts, stops = np.searchsorted(sorted_rows, rows), np.searchsorted(sorted_rows, rows, "right")
    counts = stops - starts
    targets = np.repeat(np.arange(len(rows)), counts)
    # the positions start to stop of each row, concatenated
    sources = np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)
    np.add.at(delta, (targets, columns[sources]), as_float64(values[sources]))
    return delta
