"""A change of low rank seen through the rounding of 16-bit weights.

Where a tuned model is stored as F16 or BF16, its difference from the base is the change plus rounding errors, of which
an SVD keeps a share in every direction. But the error of each weight is known to be at most half the distance of the
numbers around it, and small weights have small ones. The factors that fit best when each weight counts by the inverse
of its error's variance (weighted low-rank approximation, Srebro and Jaakkola 2003, here by alternating least squares)
come several times closer to the change. The variance is that of rounding plus that of whatever else lies between the
models, the same for all weights, which is estimated from those that rounding has changed least: the more there is, the
nearer is the result to the SVD's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gguflora.lora.model_difference import Difference
from gguflora.quants.arrays import Float32Array, Float64Array

HIGHEST_RANK: Final = 64
"""Work and memory grow with the square of the rank; above this they would be those of another program."""
_SWEEPS: Final = 5
_CLOSE: Final = 1e-4
"""A step of this share of the change is the last."""
_MANTISSA: Final = {"F16": (10, -14), "BF16": (7, -126)}
"""Bits of the mantissa, and the lowest exponent of normal numbers."""
_EXPLAINED: Final = 3.0
"""What is left over may be this many times what one rounding leaves, to be worth the work; two leave twice as much."""
_PRECISE: Final = 1 / 8
"""Share of the weights that tell how much there is besides rounding."""
_RIDGE: Final = 1e-6
_AT_ONCE: Final = 512

Factors = tuple[Float64Array, Float64Array]
Pairs = tuple[NDArray[np.intp], NDArray[np.intp]]


@dataclass(frozen=True, slots=True)
class RoundingVariance:
    """The errors that rounding may have made.

    Attributes:
        variances: by the eight bits of a float32's exponent.
        precise: variance that the `_PRECISE` share of the weights do not exceed.
        total: sum of the variances of all weights.
    """

    variances: Float32Array
    precise: float
    total: float

    @classmethod
    def from_difference(cls, item: Difference) -> RoundingVariance:
        """Of a model of 16-bit values."""
        bits, lowest = _MANTISSA[str(item.rounded_to)]
        exponents = np.maximum(np.arange(256) - 127, lowest) - bits
        variances = np.minimum(np.ldexp(1.0, 2 * exponents) / 12, np.finfo(np.float32).max / 4)
        counts = np.zeros(256)
        for _, tuned, base in item.both():
            counts += np.bincount(_exponents(tuned, base).ravel(), minlength=256)
        precise = int(np.searchsorted(np.cumsum(counts), _PRECISE * counts.sum()))
        return cls(variances.astype(np.float32), float(variances[precise]), float(counts @ variances))

    def around(self, tuned: Float32Array, base: Float32Array) -> Float32Array:
        """Variances of weights, in the model where they are larger: it is not known which was rounded."""
        found: Float32Array = self.variances[_exponents(tuned, base)]
        return found


def _exponents(tuned: Float32Array, base: Float32Array) -> NDArray[np.uint32]:
    larger = np.maximum(np.abs(tuned), np.abs(base))
    exponents: NDArray[np.uint32] = larger.view(np.uint32) >> np.uint32(23)
    return exponents


def without_rounding(item: Difference, b: Float64Array, a: Float64Array, left: float) -> Factors | None:
    """Factors that fit the precisely known weights better than an SVD's.

    Args:
        item: of 16-bit values; read once, and once for each sweep.
        b: the SVD's first factor (n_rows, rank), of rank up to `HIGHEST_RANK`.
        a: its second one (rank, n_columns).
        left: squared norm of what they leave over.

    Returns:
        None if there is much more than rounding between the models: then the SVD's are the ones to take.
    """
    rounding = RoundingVariance.from_difference(item)
    if left > _EXPLAINED * rounding.total:
        return None
    other = left / (item.n_rows * item.n_columns)
    last, now = (b, a), (b, a)
    for number in range(_SWEEPS):
        start = now if number < 2 else _beyond(last, now)
        last, (now, other) = now, _sweep(item, rounding, start, other)
        if _distance(last, now) < _CLOSE * np.linalg.norm(balanced(*now)[1]):
            break
    return now


def _distance(one: Factors, another: Factors) -> float:
    _, sizes, _ = balanced(np.hstack([one[0], -another[0]]), np.vstack([one[1], another[1]]))
    return float(np.linalg.norm(sizes))


def _beyond(last: Factors, now: Factors) -> Factors:
    """As far again as the last sweep went, cut to the rank: it saves about every other sweep."""
    rank = now[0].shape[1]
    u, sizes, v = balanced(np.hstack([2 * now[0], -last[0]]), np.vstack([now[1], last[1]]))
    return u[:, :rank] * sizes[:rank], v[:rank]


def _sweep(item: Difference, rounding: RoundingVariance, start: Factors, other: float) -> tuple[Factors, float]:
    """Fit the rows of b, block by block, then the columns of a, whose equations are summed over the blocks.

    Args:
        item: the difference of the models.
        rounding: the variance of rounding.
        start: b and a.
        other: the variance of everything else, as far as is known.

    Returns:
        b and a; and the variance of everything else, as the factors at the start show it.
    """
    u, sizes, v = balanced(*start)
    pairs = np.triu_indices(len(sizes))
    scaled, narrow = u * sizes, v.astype(np.float32)
    products = _products(narrow.T, pairs)
    gram, right = np.zeros((item.n_columns, len(pairs[0]))), np.zeros((item.n_columns, len(sizes)))
    excess, count = 0.0, 0
    for first, tuned, base in item.both():
        rows, difference = slice(first, first + len(tuned)), tuned - base
        variance = rounding.around(tuned, base)
        precision = np.float32(other) / (np.float32(other) + variance)
        error = difference - scaled[rows].astype(np.float32) @ narrow
        precise = variance <= np.float32(rounding.precise)
        excess += float(((error**2 - variance)[precise]).sum(dtype=np.float64))
        count += int(precise.sum())
        scaled[rows] += _solve(precision @ products, (precision * error) @ narrow.T, pairs)
        unit = (scaled[rows] / sizes).astype(np.float32)
        error = difference - scaled[rows].astype(np.float32) @ narrow
        gram += precision.T @ _products(unit, pairs)
        right += (precision * error).T @ unit
    a = sizes[:, None] * v + _solve(gram, right, pairs).T
    return (scaled / sizes, a), max(excess / count, 1e-6 * other)


def balanced(b: Float64Array, a: Float64Array) -> tuple[Float64Array, Float64Array, Float64Array]:
    """The SVD of ``b a``: orthonormal columns (n_rows, rank), sizes, orthonormal rows (rank, n_columns)."""
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, sizes, v = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, np.maximum(sizes, 1e-12 * sizes[0]), v @ q_a.T


def _products(vectors: Float32Array, pairs: Pairs) -> Float32Array:
    """Products of the pairs of columns."""
    found: Float32Array = vectors[:, pairs[0]] * vectors[:, pairs[1]]
    return found


def _solve(gram: NDArray[np.floating], right: NDArray[np.floating], pairs: Pairs) -> Float64Array:
    """Least squares (n, rank), of symmetric matrices given by the products of pairs."""
    n, rank = right.shape
    found = np.empty((n, rank))
    for first in range(0, n, _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        matrices = np.empty((len(gram[part]), rank, rank))
        matrices[:, pairs[0], pairs[1]] = matrices[:, pairs[1], pairs[0]] = gram[part]
        traces = np.trace(matrices, axis1=1, axis2=2)
        matrices[:, range(rank), range(rank)] += (_RIDGE * traces / rank + np.finfo(np.float32).tiny)[:, None]
        found[part] = np.linalg.solve(matrices, right[part, :, None].astype(np.float64))[..., 0]
    return found
