"""Deltas: what an adapter does to one weight. Every PEFT method is read into these classes.

A weight W has the shape (n_out, n_in), as in ``torch.nn.Linear`` and in numpy's view of a GGUF tensor. A bias or a norm
is a weight with one column, (n, 1). Arrays keep their dtype on disk (bf16 as uint16 bits, see
`gguflora.files.safetensors`) until numbers are needed.

A delta is the difference W' - W. Deltas of several adapters are added, each times its scale, so at scale s a method
that multiplies the weight gives ``W + s (W' - W)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array, as_float32
from gguflora.quants.arrays import Float64Array, Indices


class Delta(Protocol):
    """The difference between a changed weight W' and the base's weight W."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (n_out, n_in) of the changed weight; a `Replace` may have more rows than the base's weight."""

    @property
    def whole(self) -> bool:
        """Whether `compute` needs all rows at once, in order."""

    def compute(self, w: Float64Array, rows: Indices) -> Float64Array:
        """Return ``W' - W`` for some rows of W.

        Args:
            w: values of the rows, (len(rows), n_in).
            rows: numbers of the rows.

        Returns:
            float64 array (len(rows), n_in).
        """


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``W' = W + scaling * b @ a`` (LoRA: https://arxiv.org/abs/2106.09685); the only delta that a GGUF LoRA can hold.

    Attributes:
        a: (rank, n_in).
        b: (n_out, rank).
        scaling: alpha / rank, or the method's own factor.
        whole: False.
    """

    a: Array
    b: Array
    scaling: float
    whole: bool = field(default=False, init=False)

    @property
    def rank(self) -> int:
        """Number of rows of ``a`` and columns of ``b``."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the changed weight."""
        return self.b.shape[0], self.a.shape[1]

    def compute(self, w: Float64Array, rows: Indices) -> Float64Array:
        """Return ``scaling * b[rows] @ a``."""
        product: Float64Array = self.scaling * (as_float64(self.b[rows]) @ as_float64(self.a))
        return product

    def at(self, rows: Indices | None, columns: Indices | None) -> LowRank:
        """Return the delta of the weight ``W[rows][:, columns]``; None stands for all rows or columns."""
        a = self.a if columns is None else self.a[:, columns]
        b = self.b if rows is None else self.b[rows]
        return replace(self, a=a, b=b)

    def transposed(self) -> LowRank:
        """Return the delta of the transposed weight."""
        return replace(self, a=self.b.T, b=self.a.T)


@dataclass(frozen=True, slots=True, eq=False)
class Replace:
    """``W' = values``: a weight, bias or norm that the adapter holds completely.

    Attributes:
        values: (n_out, n_in).
        is_base_copy: whether the weight was not trained, so that its rows equal the base's, except for rows that were
            added to the vocabulary, and the ``trained`` ones.
        trained: numbers of rows of a copy that were trained nevertheless.
        whole: False.
    """

    values: Array
    is_base_copy: bool = False
    trained: tuple[int, ...] = ()
    whole: bool = field(default=False, init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the new weight."""
        return self.values.shape[0], self.values.shape[1]

    def compute(self, w: Float64Array, rows: Indices) -> Float64Array:
        """Return ``values[rows] - w``; 0 for rows that only the base has (padding of the vocabulary)."""
        result = np.zeros_like(w)
        known = rows < self.values.shape[0]
        result[known] = as_float64(self.values[rows[known]]) - w[known]
        return result


@dataclass(frozen=True, slots=True, eq=False)
class ReplaceRows:
    """``W'[ids] = values``: trained tokens of an embedding.

    Attributes:
        ids: distinct row numbers, (n,).
        values: new rows, (n, n_in).
        n_out: lower bound of the number of rows of the weight; the adapter does not state the number itself.
        whole: False.
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
        """Return ``values - w`` for rows that are replaced, 0 for other rows."""
        result = np.zeros_like(w)
        _, targets, sources = np.intersect1d(rows, self.ids, return_indices=True)
        result[targets] = as_float64(self.values[sources]) - w[targets]
        return result


def with_rows(weight: Replace, rows: ReplaceRows) -> Replace:
    """Return the delta that replaces a weight and then some of its rows (a resized embedding with trained tokens).

    Raises:
        AdapterError: if the weight does not have the rows, or they differ in width.
    """
    if rows.n_out > weight.shape[0] or rows.shape[1] != weight.shape[1]:
        raise AdapterError(
            f"an embedding of shape {weight.shape} is saved with trained tokens of shape {rows.values.shape}, the last "
            f"of which is row {rows.n_out - 1}; they do not belong together"
        )
    values = as_float64(weight.values).astype(np.float32)
    values[rows.ids] = as_float64(rows.values)
    return Replace(values, weight.is_base_copy, tuple(int(row) for row in rows.ids))


def trained_rows(copy: Replace) -> ReplaceRows:
    """Return the part of a copy of the base's weight that was trained."""
    ids = np.array(copy.trained, np.intp)
    return ReplaceRows(ids, copy.values[ids], 1 + max(copy.trained))


@dataclass(frozen=True, slots=True, eq=False)
class FunctionDelta:
    """A delta that is any function of the base's weight.

    Attributes:
        shape: shape (n_out, n_in) of the weight.
        function: function of rows (n, n_in) and their numbers (n,) that returns ``W' - W`` for these rows.
        whole: whether the function needs all rows at once, in order.
        caution: warning to show if the base's weight is quantized; empty for none.
    """

    shape: tuple[int, int]
    function: Callable[[Float64Array, Indices], Float64Array]
    whole: bool = False
    caution: str = ""

    def compute(self, w: Float64Array, rows: Indices) -> Float64Array:
        """Return the function's result."""
        return self.function(w, rows)


@dataclass(frozen=True, slots=True, eq=False)
class BiasFromWeight:
    """A delta of a bias: a function of the bias, plus the layer's weight times a vector.

    Attributes:
        shape: shape (n_out, 1) of the bias.
        weight: name of the layer's weight in the Hugging Face model.
        vector: vector by which the weight is multiplied, (n_in, 1).
        formula: the delta without the product.
        whole: True.
    """

    shape: tuple[int, int]
    weight: str
    vector: Float64Array
    formula: FunctionDelta
    whole: bool = field(default=True, init=False)

    def given(self, weight: Float64Array) -> FunctionDelta:
        """Return the delta, given the layer's weight (n_out, n_in)."""
        added = weight @ self.vector
        return FunctionDelta(self.shape, lambda w, rows: self.formula.compute(w, rows) + added[rows])

    def compute(self, w: Float64Array, rows: Indices) -> Float64Array:
        """Raise ``TypeError``: the bias alone is not enough, use `given`."""
        raise TypeError(f"the delta of this bias needs the weight {self.weight!r}; call given() first")


@dataclass(frozen=True, slots=True, eq=False)
class ShapeDependentDelta:
    """A delta that needs the shape of the base's weight.

    Attributes:
        known: the sizes (n_out, n_in) that follow from the adapter; None for a size that does not.
        build: function of the shape that returns the delta.
        optional: whether the base may lack this weight (a bias that is changed only if the layer has one).
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
        """Return a `ShapeDependentDelta` that builds a `FunctionDelta`; for the arguments see these two classes."""
        return cls(known, lambda shape: FunctionDelta(shape, function, whole, caution), optional)


def equal(one: Delta, other: Delta) -> bool:
    """Whether two deltas have the same type and equal attributes."""
    return type(one) is type(other) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in type(one).__annotations__
    )


def as_float64(array: Array) -> Float64Array:
    """Convert an array to float64; uint16 values are bfloat16 bits."""
    return (as_float32(array) if array.dtype == np.uint16 else array).astype(np.float64, copy=False)


def sum_factors(deltas: Iterable[tuple[LowRank, float]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return one pair of float32 factors for the sum of low-rank deltas, each times its scale.

    Returns:
        a (sum of ranks, n_in) and b (n_out, sum of ranks) with ``b @ a = sum(scale * scaling * b_i @ a_i)``.
    """
    pairs = list(deltas)
    a = np.concatenate([as_float32(delta.a) for delta, _ in pairs], axis=0)
    b = np.concatenate([fold(delta, scale) for delta, scale in pairs], axis=1)
    return np.ascontiguousarray(a), np.ascontiguousarray(b)


def fold(delta: LowRank, scale: float = 1.0) -> NDArray[np.float32]:
    """Return ``scale * scaling * b`` as float32, multiplied in float64 and rounded once."""
    return (as_float64(delta.b) * (scale * delta.scaling)).astype(np.float32)
