"""The best low-rank approximation of a delta (Eckart and Young 1936)."""

from __future__ import annotations

import numpy as np

from gguflora.adapters.deltas import LowRank, as_float64
from gguflora.errors import AdapterError
from gguflora.quants.arrays import Float64Array


def truncate(delta: Float64Array, rank: int | None, energy: float | None) -> tuple[LowRank, float]:
    """Return the closest matrix of rank ``rank``, or of the lowest rank that keeps ``energy`` of the squared norm.

    Args:
        delta: the matrix, (n_out, n_in).
        rank: the rank, or None to choose it by ``energy``.
        energy: share of the squared norm to keep, in (0, 1].

    Returns:
        The factors, each multiplied by the square root of the singular values, and the relative error (Frobenius norm).

    Raises:
        AdapterError: if rank or energy is out of range.
    """
    wide = delta.shape[0] < delta.shape[1]
    gram = delta @ delta.T if wide else delta.T @ delta
    squares, vectors = np.linalg.eigh(gram)
    squares, vectors = np.maximum(squares[::-1], 0.0), vectors[:, ::-1]
    kept = _choose_rank(squares, rank, energy)
    basis, sizes = vectors[:, :kept], np.sqrt(np.sqrt(squares[:kept]))
    sizes = np.where(sizes > 0, sizes, 1.0)
    if wide:
        a, b = (basis.T @ delta) / sizes[:, None], basis * sizes
    else:
        a, b = basis.T * sizes[:, None], (delta @ basis) / sizes
    total = float(squares.sum())
    error = float(np.sqrt(max(squares[kept:].sum(), 0.0) / total)) if total else 0.0
    return LowRank(a.astype(np.float32), b.astype(np.float32), 1.0), error


def shrink(delta: LowRank, rank: int | None, energy: float | None) -> tuple[LowRank, float]:
    """Truncate a delta that is given as factors, using QR decompositions instead of the dense product."""
    q_b, r_b = np.linalg.qr(delta.scaling * as_float64(delta.b))
    q_a, r_a = np.linalg.qr(as_float64(delta.a).T)
    core, error = truncate(r_b @ r_a.T, rank, energy)
    a, b = as_float64(core.a) @ q_a.T, q_b @ as_float64(core.b)
    return LowRank(a.astype(np.float32), b.astype(np.float32), 1.0), error


def _choose_rank(squares: Float64Array, rank: int | None, energy: float | None) -> int:
    if rank is not None:
        if rank < 1:
            raise AdapterError(f"rank is {rank}, expected a positive whole number")
        return min(rank, len(squares))
    if energy is None or not 0 < energy <= 1:
        raise AdapterError(f"energy is {energy}, expected a share from 0 to 1, for example 0.999")
    sums = np.cumsum(squares)
    return int(np.searchsorted(sums, energy * sums[-1] * (1 - 1e-12))) + 1 if sums[-1] else 1
