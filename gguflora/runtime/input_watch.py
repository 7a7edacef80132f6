"""What the hook into llama.cpp's graph sums over the inputs of weights: squares, and sketches of second moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gguflora.quants._lib import ffi, lib
from gguflora.quants.arrays import Float32Array, Float64Array

SKETCH: Final[int] = lib.GFL_SKETCH
"""Columns of a sketch."""

_LONGEST: Final = 63
"""Bytes of the longest name that a tensor of ggml can have."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Sums over the inputs of one weight, the columns x that products multiply it with.

    Attributes:
        counts: number of columns: (n_matrices,) of a stack of experts, which see different columns; else (1,).
        squares: sums of x**2, (n_matrices, n_in).
        sketch: sums of ``outer(x, x @ omega)``, (n_matrices, n_in, SKETCH); None if not asked for.
        same_as: the weight that has the same inputs and shares these arrays, or None.
    """

    counts: NDArray[np.int64]
    squares: Float64Array
    sketch: Float32Array | None
    same_as: str | None


class InputWatch:
    """The sums of some weights, in memory that the hook fills.

    Args:
        weights: number of matrices and of columns (n_matrices, n_in) by name of the weight.
        omega: returns the random matrix (n_in, SKETCH) for a number of columns; None for no sketches.

    Attributes:
        pointer: the ``gfl_watched *``.
    """

    def __init__(
        self, weights: Mapping[str, tuple[int, int]], omega: Callable[[int], Float32Array] | None = None
    ) -> None:
        usable = {name: size for name, size in weights.items() if len(name.encode()) <= _LONGEST}
        self._names = sorted(usable, key=str.encode)
        self._omegas = {n_in: omega(n_in) for _, n_in in usable.values()} if omega else {}
        self._counts = [np.zeros(usable[name][0], np.int64) for name in self._names]
        self._squares = [np.zeros(usable[name]) for name in self._names]
        # memory that is not written is not taken: weights with the same inputs fill only one of their arrays
        sketches = [np.zeros((*usable[name], SKETCH), np.float32) for name in self._names if omega]
        self._sketches: list[Float32Array | None] = [*sketches] or [None] * len(self._names)
        self.pointer: Any = ffi.new("gfl_watched[]", len(self._names))
        for index, name in enumerate(self._names):
            entry, (n_matrices, n_in) = self.pointer[index], usable[name]
            entry.name, entry.n_in, entry.n_matrices, entry.same_as = name.encode(), n_in, n_matrices, -1
            entry.squares = ffi.cast("double *", self._squares[index].ctypes.data)
            entry.counts = ffi.cast("int64_t *", self._counts[index].ctypes.data)
            sketch = self._sketches[index]
            if sketch is not None:
                entry.sketch = ffi.cast("float *", sketch.ctypes.data)
                entry.omega = ffi.cast("float *", self._omegas[n_in].ctypes.data)

    def __len__(self) -> int:
        return len(self._names)

    def found(self) -> dict[str, Inputs]:
        """Return the sums of all weights that the graph multiplied something with."""
        return {name: self._found(index) for index, name in enumerate(self._names) if self.pointer[index].seen}

    def _found(self, index: int) -> Inputs:
        entry = self.pointer[index]
        at = index if entry.same_as < 0 else entry.same_as
        counts = self._counts[at] if entry.by_expert else self._counts[at][:1]
        same_as = None if entry.same_as < 0 else self._names[entry.same_as]
        return Inputs(counts, self._squares[at], self._sketches[at], same_as)
