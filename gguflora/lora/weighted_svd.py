"""Recover a low-rank delta from weights that were rounded to 16 bits.

If a tuned model is stored as F16 or BF16, its difference from the base is the delta plus rounding errors, and an SVD
keeps a share of those errors in every direction. But the rounding error of a weight is at most half the spacing of the
numbers around it, and this spacing is known and small for small weights. Weighted low-rank approximation (Srebro and
Jaakkola 2003, here by alternating least squares) weights each entry by the inverse variance of its error and comes
several times closer to the delta than the SVD.

The variance is the sum of two parts: that of rounding, and that of all other differences, which is assumed equal for
all weights and estimated from the weights with the smallest rounding errors. The larger the second part, the closer
the result is to the SVD's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gguflora.lora.model_difference import Difference
from gguflora.quants.arrays import Float32Array, Float64Array

HIGHEST_RANK: Final = 64
"""Work and memory grow with the square of the rank; above this limit the SVD's factors are used."""
_SWEEPS: Final = 5
_CLOSE: Final = 1e-4
"""Stop when a sweep moves the delta by less than this share of its norm."""
_MANTISSA: Final = {"F16": (10, -14), "BF16": (7, -126)}
"""Mantissa bits and lowest exponent of normal numbers."""
_WORTHWHILE: Final = 3.0
"""Highest ratio of the remainder to the error of one rounding that is worth the work; two roundings give 2."""
_PRECISE_SHARE: Final = 1 / 8
"""Share of the weights, those with the smallest rounding errors, that estimate the other differences."""
_RIDGE: Final = 1e-6
_BATCH: Final = 512

Factors = tuple[Float64Array, Float64Array]
Pairs = tuple[NDArray[np.intp], NDArray[np.intp]]


@dataclass(frozen=True, slots=True)
class RoundingVariance:
    """The variance of the rounding errors of a model's weights.

    Attributes:
        variances: variance of a weight's error, by the eight exponent bits of its float32 value.
        precise: highest variance among the `_PRECISE_SHARE` of the weights with the smallest errors.
        total: sum of the variances of all weights.
    """

    variances: Float32Array
    precise: float
    total: float

    @classmethod
    def from_difference(cls, item: Difference) -> RoundingVariance:
        """Compute the variances for a tuned model with 16-bit values."""
        bits, lowest = _MANTISSA[str(item.rounded_to)]
        exponents = np.maximum(np.arange(256) - 127, lowest) - bits
        variances = np.minimum(np.ldexp(1.0, 2 * exponents) / 12, np.finfo(np.float32).max / 4)
        counts = np.zeros(256)
        for _, tuned, base in item.both():
            counts += np.bincount(_exponents(tuned, base).ravel(), minlength=256)
        precise = int(np.searchsorted(np.cumsum(counts), _PRECISE_SHARE * counts.sum()))
        return cls(variances.astype(np.float32), float(variances[precise]), float(counts @ variances))

    def around(self, tuned: Float32Array, base: Float32Array) -> Float32Array:
        """Return the variance of each weight, for the larger of both values: it is unknown which one was rounded."""
        variances: Float32Array = self.variances[_exponents(tuned, base)]
        return variances


def _exponents(tuned: Float32Array, base: Float32Array) -> NDArray[np.uint32]:
    larger = np.maximum(np.abs(tuned), np.abs(base))
    exponents: NDArray[np.uint32] = larger.view(np.uint32) >> np.uint32(23)
    return exponents


def without_rounding(item: Difference, b: Float64Array, a: Float64Array, remainder: float) -> Factors | None:
    """Refine an SVD's factors by weighting each entry with the inverse variance of its error.

    Args:
        item: difference of models with 16-bit values; read once, and once more for each sweep.
        b: left factor of the SVD, (n_rows, rank), of rank up to `HIGHEST_RANK`.
        a: right factor of the SVD, (rank, n_columns).
        remainder: squared norm of the difference minus ``b a``.

    Returns:
        The refined b and a, or None if the models differ by much more than rounding: keep the SVD's factors then.
    """
    rounding = RoundingVariance.from_difference(item)
    if remainder > _WORTHWHILE * rounding.total:
        return None
    other = remainder / (item.n_rows * item.n_columns)
    previous, current = (b, a), (b, a)
    for number in range(_SWEEPS):
        start = current if number < 2 else _extrapolate(previous, current)
        previous, (current, other) = current, _sweep(item, rounding, start, other)
        if _distance(previous, current) < _CLOSE * np.linalg.norm(svd_of_product(*current)[1]):
            break
    return current


def _distance(one: Factors, another: Factors) -> float:
    _, sizes, _ = svd_of_product(np.hstack([one[0], -another[0]]), np.vstack([one[1], another[1]]))
    return float(np.linalg.norm(sizes))


def _extrapolate(previous: Factors, current: Factors) -> Factors:
    """Extrapolate by the step of the previous sweep, truncated to the rank; this saves about every other sweep."""
    rank = current[0].shape[1]
    u, sizes, v = svd_of_product(np.hstack([2 * current[0], -previous[0]]), np.vstack([current[1], previous[1]]))
    return u[:, :rank] * sizes[:rank], v[:rank]


def _sweep(item: Difference, rounding: RoundingVariance, start: Factors, other: float) -> tuple[Factors, float]:
    """Fit the rows of b, block by block, then the columns of a, whose equations are summed over the blocks.

    Args:
        item: difference of the models.
        rounding: variance of the rounding errors.
        start: b and a before the sweep.
        other: estimated variance of all other differences.

    Returns:
        The new b and a, and the variance of all other differences as estimated with the factors in ``start``.
    """
    u, sizes, v = svd_of_product(*start)
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


def svd_of_product(b: Float64Array, a: Float64Array) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Return the SVD of ``b a``: columns (n_rows, rank), singular values (rank,), rows (rank, n_columns)."""
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, sizes, v = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, np.maximum(sizes, 1e-12 * sizes[0]), v @ q_a.T


def _products(vectors: Float32Array, pairs: Pairs) -> Float32Array:
    """Return the products of the given pairs of columns."""
    products: Float32Array = vectors[:, pairs[0]] * vectors[:, pairs[1]]
    return products


def _solve(gram: NDArray[np.floating], right: NDArray[np.floating], pairs: Pairs) -> Float64Array:
    """Solve n symmetric systems of size rank, whose matrices are given as their upper triangles; return (n, rank)."""
    n, rank = right.shape
    solution = np.empty((n, rank))
    for first in range(0, n, _BATCH):
        part = slice(first, first + _BATCH)
        matrices = np.empty((len(gram[part]), rank, rank))
        matrices[:, pairs[0], pairs[1]] = matrices[:, pairs[1], pairs[0]] = gram[part]
        traces = np.trace(matrices, axis1=1, axis2=2)
        matrices[:, range(rank), range(rank)] += (_RIDGE * traces / rank + np.finfo(np.float32).tiny)[:, None]
        solution[part] = np.linalg.solve(matrices, right[part, :, None].astype(np.float64))[..., 0]
    return solution
