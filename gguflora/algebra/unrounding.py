"""A change of low rank seen through the rounding of 16-bit weights.

Where a tuned model is stored as F16 or BF16, its difference from the base is the change plus rounding errors, of which
an SVD keeps a share in every direction. But the error of each weight is known to be at most half the distance of the
numbers around it, and small weights have small ones. The factors that fit best when each weight counts by the inverse
square of that distance (weighted low-rank approximation, Srebro and Jaakkola 2003, here by alternating least squares)
come several times closer to the change. This holds where rounding explains what an SVD leaves over, so it is done only
there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gguflora.algebra.differences import Difference, Floats
from gguflora.deltas import Values

HIGHEST_RANK: Final = 64
"""Work and memory grow with the square of the rank; above this they would be those of another program."""
_SWEEPS: Final = 6
_CLOSE: Final = 1e-4
"""A step of this share of the change is the last."""
_MANTISSA: Final = {"F16": (10, -14), "BF16": (7, -126)}
"""Bits of the mantissa, and the lowest exponent of normal numbers."""
_EXPLAINED: Final = 3.0
"""What is left over may be this many times what one rounding leaves, to count as such: both models may be rounded."""
_NEGLIGIBLE: Final = 2.0**-14
"""Rounding below this share of the change's own size is as good as none."""
_RIDGE: Final = 1e-6
_AT_ONCE: Final = 512

Pairs = tuple[NDArray[np.intp], NDArray[np.intp]]


@dataclass(frozen=True, slots=True)
class Rounding:
    """How far apart the numbers around each weight are.

    Attributes:
        squares: squared distance by the exponent's eight bits of a float32, in units of ``unit`` squared.
        unit: the distance below which weights are to count the same.
    """

    squares: Floats
    unit: float

    @classmethod
    def of(cls, kind: str, unit: float) -> Rounding:
        """Of a 16-bit type, ``F16`` or ``BF16``."""
        bits, lowest = _MANTISSA[kind]
        exponents = np.maximum(np.arange(256) - 127, lowest) - bits
        squares = np.ldexp(1.0, 2 * exponents) / unit**2
        return cls(np.minimum(squares, np.finfo(np.float32).max / 4).astype(np.float32), unit)

    def around(self, tuned: Floats, base: Floats) -> Floats:
        """Squared distances around weights, in the model where they are larger: it is not known which was rounded."""
        larger = np.maximum(np.abs(tuned), np.abs(base))
        found: Floats = self.squares[larger.view(np.uint32) >> np.uint32(23)]
        return found


def is_rounding(item: Difference, left: float, norm: float) -> bool:
    """Whether rounding explains a squared norm ``left`` of a difference of squared norm ``norm``."""
    if item.rounded_to is None or left <= 1e-9 * norm:
        return False
    rounding, total = Rounding.of(item.rounded_to, _size(item, norm)), 0.0
    for _, tuned, base in item.both():
        total += float(rounding.around(tuned, base).sum(dtype=np.float64))
    return left <= _EXPLAINED * total * rounding.unit**2 / 12


def without_rounding(item: Difference, b: Values, a: Values, norm: float) -> tuple[Values, Values]:
    """Factors (n_rows, rank) and (rank, n_columns) that fit the exactly known weights better than ``b a`` does.

    Args:
        item: of rank up to `HIGHEST_RANK`; read once for each sweep.
        b: first factor to begin with.
        a: second factor.
        norm: squared norm of the difference.
    """
    rounding = Rounding.of(str(item.rounded_to), _NEGLIGIBLE * _size(item, norm))
    last = b, a = _sweep(item, rounding, b, a)
    for number in range(1, _SWEEPS):
        start = (b, a) if number == 1 else _beyond(last, (b, a))
        last, (b, a) = (b, a), _sweep(item, rounding, *start)
        if _distance(last, (b, a)) < _CLOSE * np.sqrt(norm):
            break
    return b, a


def _distance(one: tuple[Values, Values], other: tuple[Values, Values]) -> float:
    _, sizes, _ = balanced(np.hstack([one[0], -other[0]]), np.vstack([one[1], other[1]]))
    return float(np.linalg.norm(sizes))


def _size(item: Difference, norm: float) -> float:
    return float(np.sqrt(norm / (item.n_rows * item.n_columns)))


def _beyond(last: tuple[Values, Values], now: tuple[Values, Values]) -> tuple[Values, Values]:
    """As far again as the last sweep went, cut to the rank: it saves about every other sweep."""
    rank = now[0].shape[1]
    u, sizes, v = balanced(np.hstack([2 * now[0], -last[0]]), np.vstack([now[1], last[1]]))
    return u[:, :rank] * sizes[:rank], v[:rank]


def _sweep(item: Difference, rounding: Rounding, b: Values, a: Values) -> tuple[Values, Values]:
    """Fit the rows of b, block by block, then the columns of a, whose equations are summed over the blocks."""
    u, sizes, v = balanced(b, a)
    pairs = np.triu_indices(len(sizes))
    scaled, narrow = u * sizes, v.astype(np.float32)
    products = _products(narrow.T, pairs)
    gram, right = np.zeros((item.n_columns, len(pairs[0]))), np.zeros((item.n_columns, len(sizes)))
    for rows, difference, precision in _blocks(item, rounding):
        error = difference - scaled[rows].astype(np.float32) @ narrow
        scaled[rows] += _solve(precision @ products, (precision * error) @ narrow.T, pairs)
        unit = (scaled[rows] / sizes).astype(np.float32)
        error = difference - scaled[rows].astype(np.float32) @ narrow
        gram += precision.T @ _products(unit, pairs)
        right += (precision * error).T @ unit
    return scaled / sizes, sizes[:, None] * v + _solve(gram, right, pairs).T


def _blocks(item: Difference, rounding: Rounding) -> Iterator[tuple[slice, Floats, Floats]]:
    """Rows, their difference, and how much each weight counts."""
    for first, tuned, base in item.both():
        yield slice(first, first + len(tuned)), tuned - base, np.reciprocal(1 + rounding.around(tuned, base))


def balanced(b: Values, a: Values) -> tuple[Values, Values, Values]:
    """The SVD of ``b a``: orthonormal columns (n_rows, rank), sizes, orthonormal rows (rank, n_columns)."""
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, sizes, v = np.linalg.svd(r_b @ r_a.T)
    return q_b @ u, np.maximum(sizes, 1e-12 * sizes[0]), v @ q_a.T


def _products(vectors: Floats, pairs: Pairs) -> Floats:
    """Products of the pairs of columns."""
    found: Floats = vectors[:, pairs[0]] * vectors[:, pairs[1]]
    return found


def _solve(gram: NDArray[np.floating], right: NDArray[np.floating], pairs: Pairs) -> Values:
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
