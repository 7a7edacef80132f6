"""What an adapter does to one weight: the vocabulary that every PEFT method is read into.

A weight W is (n_out, n_in), as ``torch.nn.Linear`` and numpy's view of a GGUF tensor have it; a bias or a norm is taken
for a weight of one column, (n, 1). Arrays keep the dtype they have on disk (bf16 as uint16 bits, see
`gguflora.files.safetensors`) until numbers are needed.

A change says how W' differs from W. Changes of several adapters are added, each times its scale, so at scale s a method
that multiplies gives ``W + s (W' - W)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gguflora.files.safetensors import Array, as_float32
from gguflora.quants.arrays import Float64Array, Indices


class Delta(Protocol):
    """A change of one weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (n_out, n_in) of the changed weight; a `Replace` may have more rows than the base's."""

    @property
    def whole(self) -> bool:
        """Whether `compute` must be given all rows at once, in order."""

    def compute(self, w: Float64Array, rows: Indices) -> Float64Array:
        """``W' - W`` for some rows of W.

        Args:
            w: the rows' values, (len(rows), n_in).
            rows: their numbers.
        """


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``W + scaling * b @ a`` (LoRA: https://arxiv.org/abs/2106.09685); the only change a GGUF LoRA can hold.

    Attributes:
        a: (rank, n_in).
        b: (n_out, rank).
        scaling: alpha / rank, or what the method puts in its place.
    """

    a: Array
    b: Array
    scaling: float
    whole: bool = field(default=False, init=False)

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the changed weight."""
        return self.b.shape[0], self.a.shape[1]

    def compute(self, w: Float64Array, rows: Indices) -> Float64Array:
        """``scaling * b[rows] @ a``."""
        product: Float64Array = self.scaling * (as_float64(self.b[rows]) @ as_float64(self.a))
        return product

    def at(self, rows: Indices | None, columns: Indices | None) -> LowRank:
        """The change of the weight ``W[rows][:, columns]``."""
        a = self.a if columns is None else self.a[:, columns]
        b = self.b if rows is None else self.b[rows]
        return replace(self, a=a, b=b)

    def transposed(self) -> LowRank:
        """The change of the transposed weight."""
        return replace(self, a=self.b.T, b=self.a.T)


@dataclass(frozen=True, slots=True, eq=False)
class Replace:
    """``W' = values``: a weight, bias or norm that was saved whole.

    Attributes:
        values: (n_out, n_in).
        frozen: whether training left it alone, so that it is a copy of the base's unless its vocabulary was resized.
    """

    values: Array
    is_base_copy: bool = False
    whole: bool = field(default=False, init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the new weight."""
        return self.values.shape[0], self.values.shape[1]

    def compute(self, w: Float64Array, rows: Indices) -> Float64Array:
        """``values[rows] - w``; 0 for rows the base has beyond them (a padded vocabulary)."""
        result = np.zeros_like(w)
        known = rows < self.values.shape[0]
        result[known] = as_float64(self.values[rows[known]]) - w[known]
        return result


@dataclass(frozen=True, slots=True, eq=False)
class ReplaceRows:
    """``W'[ids] = values``: trained tokens of an embedding.

    Attributes:
        ids: (n,) distinct row numbers.
        values: (n, n_in).
        n_out: rows of the weight, as far as the adapter knows: it may be fewer than the base's.
    """

    ids: Indices
    values: Array
    n_out: int
    whole: bool = field(default=False, init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the changed weight."""
        return self.n_out, self.values.shape[1]

    def compute(self, w: Float64Array, rows: Indices) -> Float64Array:
        """``values - w`` in the rows that are replaced, 0 elsewhere."""
        result = np.zeros_like(w)
        _, here, there = np.intersect1d(rows, self.ids, return_indices=True)
        result[here] = as_float64(self.values[there]) - w[here]
        return result


@dataclass(frozen=True, slots=True, eq=False)
class FunctionDelta:
    """A change by any formula of the base's weight.

    Attributes:
        shape: (n_out, n_in) of the weight.
        function: from some rows' values (n, n_in) and their numbers to ``W' - W`` of these rows.
        whole: whether the function must be given all rows at once, in order.
        caution: what to warn of where the base's weight is quantized.
    """

    shape: tuple[int, int]
    function: Callable[[Float64Array, Indices], Float64Array]
    whole: bool = False
    caution: str = ""

    def compute(self, w: Float64Array, rows: Indices) -> Float64Array:
        """The function's result."""
        return self.function(w, rows)


@dataclass(frozen=True, slots=True, eq=False)
class BiasFromWeight:
    """A change of a bias by any formula of it, plus its layer's weight times a vector.

    Attributes:
        shape: (n_out, 1).
        weight: name of the layer's weight in the Hugging Face model.
        vector: (n_in, 1).
        formula: the rest of the change.
    """

    shape: tuple[int, int]
    weight: str
    vector: Float64Array
    formula: FunctionDelta
    whole: bool = field(default=True, init=False)

    def given(self, weight: Float64Array) -> FunctionDelta:
        """The change once the layer's weight (n_out, n_in) is known."""
        added = weight @ self.vector
        return FunctionDelta(self.shape, lambda w, rows: self.formula.compute(w, rows) + added[rows])

    def compute(self, w: Float64Array, rows: Indices) -> Float64Array:
        """Not to be had from the bias alone: see `given`."""
        raise TypeError(f"needs {self.weight!r}")


@dataclass(frozen=True, slots=True, eq=False)
class ShapeDependentDelta:
    """A change of a weight whose shape only the base tells.

    Attributes:
        known: as much of the weight's shape (n_out, n_in) as the adapter tells.
        build: from the shape to the change.
        optional: whether a base without this weight is right, too (a bias that a method changes where there is one).
    """

    known: tuple[int | None, int | None]
    build: Callable[[tuple[int, int]], Delta]
    optional: bool = False

    @classmethod
    def formula(
        cls,
        known: tuple[int | None, int | None],
        function: Callable[[Float64Array, Indices], Float64Array],
        *,
        whole: bool = False,
        optional: bool = False,
        caution: str = "",
    ) -> ShapeDependentDelta:
        """A `FunctionDelta` that takes the base's shape."""
        return cls(known, lambda shape: FunctionDelta(shape, function, whole, caution), optional)


def equal(one: Delta, other: Delta) -> bool:
    """Whether two changes are the same, as far as their attributes tell."""
    return type(one) is type(other) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in type(one).__annotations__
    )


def as_float64(array: Array) -> Float64Array:
    """The values of an array as float64; uint16 is taken for bfloat16 bits."""
    return (as_float32(array) if array.dtype == np.uint16 else array).astype(np.float64, copy=False)


def sum_factors(deltas: Iterable[tuple[LowRank, float]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One pair of float32 factors for a sum of low-rank changes, each times its scale.

    Returns:
        a (sum of ranks, n_in) and b (n_out, sum of ranks) with ``b @ a = sum(scale * scaling * b_i @ a_i)``.
    """
    pairs = list(deltas)
    a = np.concatenate([as_float32(delta.a) for delta, _ in pairs], axis=0)
    b = np.concatenate([fold(delta, scale) for delta, scale in pairs], axis=1)
    return np.ascontiguousarray(a), np.ascontiguousarray(b)


def fold(delta: LowRank, scale: float = 1.0) -> NDArray[np.float32]:
    """``scale * scaling * b`` in float32, multiplied in float64 and rounded once."""
    return (as_float64(delta.b) * (scale * delta.scaling)).astype(np.float32)
