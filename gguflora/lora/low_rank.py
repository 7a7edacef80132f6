"""Deltas of any rank, their best low-rank approximation (Eckart and Young 1936), and its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from gguflora.adapters.deltas import LowRank, as_float64
from gguflora.errors import AdapterError
from gguflora.quants.arrays import Float64Array

_NOTABLE: Final = 1e-4
"""Above this relative error the rounding of the factors to float32 does not count."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A delta that is not given as factors.

    Attributes:
        shape: (n_out, n_in).
        values: reads or computes the matrix, float64 (n_out, n_in).
    """

    shape: tuple[int, int]
    values: Callable[[], Float64Array]

    def transposed(self) -> Dense:
        """Return the delta of the transposed weight."""
        return Dense((self.shape[1], self.shape[0]), lambda: self.values().T)


Uncut = LowRank | Dense
"""A delta of which nothing has been cut off."""


@dataclass(frozen=True, slots=True)
class RankRule:
    """How the rank of a delta follows from its singular values. Exactly one field is given.

    The last two are dynamic methods of kohya's ``resize_lora.py``, which keeps one singular value more.

    Attributes:
        rank: the highest rank.
        energy: the lowest rank that keeps this share of the squared norm, in (0, 1].
        sv_ratio: keep the singular values above the largest one divided by this number, 1 or more.
        sv_fro: the lowest rank that keeps this share of the Frobenius norm, in (0, 1]: an energy of its square.
    """

    rank: int | None = None
    energy: float | None = None
    sv_ratio: float | None = None
    sv_fro: float | None = None

    @property
    def given(self) -> dict[str, float]:
        """The fields that are given."""
        fields = {"rank": self.rank, "energy": self.energy, "sv_ratio": self.sv_ratio, "sv_fro": self.sv_fro}
        return {name: value for name, value in fields.items() if value is not None}

    def check(self) -> None:
        """Raise ``AdapterError`` if the number is impossible, or not exactly one is given."""
        if len(self.given) != 1:
            raise AdapterError(f"expected one of rank, energy, sv_ratio and sv_fro; found {list(self.given) or 'none'}")
        if self.rank is not None and self.rank < 1:
            raise AdapterError(f"rank is {self.rank}, expected a positive whole number")
        if self.sv_ratio is not None and not 1 <= self.sv_ratio < math.inf:
            raise AdapterError(f"sv_ratio is {self.sv_ratio}, expected a number from 1, for example 20")
        for name, share in (("energy", self.energy), ("sv_fro", self.sv_fro)):
            if share is not None and not 0 < share <= 1:
                raise AdapterError(f"{name} is {share}, expected a share from 0 to 1, for example 0.999")

    def choose(self, squares: Float64Array) -> int:
        """Return the rank for the squares of singular values, largest first; 1 for a delta of zeros."""
        if self.rank is not None:
            return min(self.rank, len(squares))
        if not squares[0]:
            return 1
        if self.sv_ratio is not None:
            return max(1, int((squares * self.sv_ratio**2 > squares[0]).sum()))
        share = self.sv_fro**2 if self.sv_fro is not None else self.energy
        assert share is not None
        sums = np.cumsum(squares)
        return int(np.searchsorted(sums, share * sums[-1] * (1 - 1e-12))) + 1


@dataclass(frozen=True, slots=True)
class Fit:
    """How well factors reproduce a delta.

    Attributes:
        squared: squared Frobenius norm of the whole delta.
        lost: squared Frobenius norm of the whole delta minus the factors' product.
    """

    squared: float
    lost: float

    @property
    def error(self) -> float:
        """Relative error in the Frobenius norm."""
        return math.sqrt(self.lost / self.squared) if self.squared else 0.0

    @property
    def energy(self) -> float:
        """Share of the squared norm that is kept."""
        return 1.0 - min(self.lost / self.squared, 1.0) if self.squared else 1.0


def sum_fits(fits: Iterable[Fit]) -> Fit:
    """Return the fit of several deltas taken together."""
    known = list(fits)
    return Fit(math.fsum(fit.squared for fit in known), math.fsum(fit.lost for fit in known))


def approximation_warnings(deltas: Mapping[str, Uncut], fits: Mapping[str, Fit]) -> list[str]:
    """Return a warning for each delta that was no product of factors and lost something."""
    return [
        f"{name}: approximated, relative error {fit.error:.2g}"
        for name, fit in fits.items()
        if isinstance(deltas.get(name), Dense) and fit.lost
    ]


def highest_rank(delta: Uncut) -> int:
    """Return the rank that a delta may have at most."""
    return min(delta.shape) if isinstance(delta, Dense) else delta.rank


def values_of(delta: Uncut) -> Float64Array:
    """Return a delta as a matrix, float64 (n_out, n_in)."""
    if isinstance(delta, Dense):
        return delta.values()
    product: Float64Array = delta.scaling * as_float64(delta.b) @ as_float64(delta.a)
    return product


def cut(delta: Uncut, rule: RankRule, stored: Callable[[LowRank], LowRank] | None = None) -> tuple[LowRank, Fit]:
    """Return the closest delta of the rank that a rule chooses, and how well it fits.

    A delta that is given as factors of no higher rank is returned as it is.

    Args:
        delta: the whole delta.
        rule: chooses the rank.
        stored: rounds the factors as they will be stored; the fit is that of the rounded factors.

    Raises:
        AdapterError: if the rule is impossible.
    """
    rule.check()
    whole = delta if isinstance(delta, LowRank) else _Computed(delta.values())
    squared, error = _squared_norm(whole), 0.0
    if isinstance(whole, _Computed):
        kept, error = truncate(whole.matrix, rule)
    elif rule.rank is not None and whole.rank <= rule.rank:
        kept = whole
    else:
        smaller, error = shrink(whole, rule)
        kept, error = (smaller, error) if smaller.rank < whole.rank else (whole, 0.0)
    if stored is None and (kept is whole or error > _NOTABLE):
        return kept, Fit(squared, error**2 * squared)
    return kept, Fit(squared, _squared_distance(whole, kept if stored is None else stored(kept)))


@dataclass(frozen=True, slots=True, eq=False)
class _Computed:
    matrix: Float64Array


def _squared_norm(delta: LowRank | _Computed) -> float:
    if isinstance(delta, _Computed):
        return float(np.vdot(delta.matrix, delta.matrix))
    b, a = as_float64(delta.b), as_float64(delta.a)
    return max(delta.scaling**2 * float(((b.T @ b) * (a @ a.T)).sum()), 0.0)


def _squared_distance(whole: LowRank | _Computed, other: LowRank) -> float:
    """Return the squared norm of ``whole - other``; the difference of factors is computed without cancellation."""
    b, a = other.scaling * as_float64(other.b), as_float64(other.a)
    if isinstance(whole, _Computed):
        rest = whole.matrix - b @ a
        return float(np.vdot(rest, rest))
    left = np.hstack([whole.scaling * as_float64(whole.b), -b])
    right = np.vstack([as_float64(whole.a), a])
    core = np.linalg.qr(left)[1] @ np.linalg.qr(right.T)[1].T
    return float(np.vdot(core, core))


def truncate(delta: Float64Array, rule: RankRule) -> tuple[LowRank, float]:
    """Return the closest matrix of the rank that a rule chooses.

    Args:
        delta: the matrix, (n_out, n_in).
        rule: chooses the rank.

    Returns:
        The factors, each multiplied by the square root of the singular values, and the relative error (Frobenius norm).
    """
    wide = delta.shape[0] < delta.shape[1]
    gram = delta @ delta.T if wide else delta.T @ delta
    squares, vectors = np.linalg.eigh(gram)
    squares, vectors = np.maximum(squares[::-1], 0.0), vectors[:, ::-1]
    kept = rule.choose(squares)
    basis, sizes = vectors[:, :kept], np.sqrt(np.sqrt(squares[:kept]))
    sizes = np.where(sizes > 0, sizes, 1.0)
    if wide:
        a, b = (basis.T @ delta) / sizes[:, None], basis * sizes
    else:
        a, b = basis.T * sizes[:, None], (delta @ basis) / sizes
    total = float(squares.sum())
    error = float(np.sqrt(max(squares[kept:].sum(), 0.0) / total)) if total else 0.0
    return LowRank(a.astype(np.float32), b.astype(np.float32), 1.0), error


def shrink(delta: LowRank, rule: RankRule) -> tuple[LowRank, float]:
    """Truncate a delta that is given as factors, using QR decompositions instead of the dense product."""
    q_b, r_b = np.linalg.qr(delta.scaling * as_float64(delta.b))
    q_a, r_a = np.linalg.qr(as_float64(delta.a).T)
    u, sizes, v = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    squares = sizes**2
    kept = rule.choose(squares)
    roots = np.sqrt(sizes[:kept])
    a, b = roots[:, None] * (v[:kept] @ q_a.T), (q_b @ u[:, :kept]) * roots
    total = float(squares.sum())
    error = float(np.sqrt(squares[kept:].sum() / total)) if total else 0.0
    return LowRank(a.astype(np.float32), b.astype(np.float32), 1.0), error
