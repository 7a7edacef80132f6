"""Values added to single elements of a weight."""

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
    """The change that adds ``values[k]`` at (rows[k], columns[k]), for an element named twice both.

    Raises:
        AdapterError: if an index lies outside the shape; it begins with ``where``.
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
    starts, ends = np.searchsorted(sorted_rows, rows), np.searchsorted(sorted_rows, rows, "right")
    counts = ends - starts
    here = np.repeat(np.arange(len(rows)), counts)
    # positions start..end of each row, one after another
    there = np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)
    np.add.at(delta, (here, columns[there]), as_float64(values[there]))
    return delta
