"""Calibrated rounding: keep the few directions in which a delta matters, and change as little as possible otherwise.

Stochastic rounding keeps a small delta on average and adds noise that at four bits and fewer shows in the answers. With
the second moments H of the inputs of a weight, two things move instead, starting from the base's blocks:

- The half-precision scales. A change of their last bits moves the weights of a block by far less than a step, so no
  noise is added. For each row those changes are found at once that lower ``e H e^T`` most, ``e`` being the error of the
  row.
- Single codes, by one level: those first whose move lowers

      tr(E H E^T) + |U^T E|_H^2,    E = W' - (W + delta)

  most, with U the four output directions that hold most of delta's effect, times the square root of `MU`. The first
  term alone would shrink the delta itself, because to change nothing costs little; the second term keeps it.

H gets the adapter's own input directions, since the text may not be of the adapter's domain, and a small multiple of
the identity. If the first search does not reach the delta in the directions of U, the target is moved further and the
search goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gguflora.errors import QuantizationError
from gguflora.merging.moments import RANK
from gguflora.quants import kernels
from gguflora.quants.arrays import Bytes, Float32Array, Float64Array
from gguflora.quants.types import GgmlType, type_named

MU: Final = 10.0
"""How much more the kept directions count."""

_LIMITS: Final = (16, 8, 4, 2, 1.4, 1, 0.75, 0.6, 0.55, 0.5)
"""Of each pass, in steps: a code moves if its best move is larger. From 0.5 on a move lowers the error."""

_OWN: Final = 0.5
_IDENTITY: Final = 0.01
"""Shares of the adapter's input directions and of the identity in H, in units of H's mean diagonal."""

_FIT: Final = (0.0,)
"""A search that fits the scales, each row by itself."""

_LATE: Final = _LIMITS[3:]
"""Of the codes' search after such a fit, which leaves little to do."""

_ENOUGH: Final = 0.8
"""If the scales alone reach this share of a delta in the kept directions, the search begins with them. They do where a
block has 32 weights and the inputs have few strong directions; a super-block has a scale or two for 256 weights."""

LEAST_REACHED: Final = 0.01
"""Share of a delta that the chosen scales must reach. They are float16: where they overflow, they reach almost none."""

_REACHED: Final = (0.2, 0.995)
_MOST_GAIN: Final = 1.6
_SKETCHED: Final = 32
_FLOAT: Final = type_named("F32")
_LEFT_TO_ADAPTIVE: Final = ("IQ1", "IQ2", "IQ3", "Q6_K", "Q8_0")


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A matrix in its new codes, with sums for the report.

    Attributes:
        blocks: the new rows.
        sums: `gguflora.quants.kernels.SUMS` over all rows.
        moved: ``<U^T (W' - W) H, U^T delta>``.
        wanted: ``<U^T delta H, U^T delta>``.
    """

    blocks: Bytes
    sums: NDArray[np.float64]
    moved: float
    wanted: float


def can_calibrate(type: GgmlType) -> bool:
    """Whether codes of a type are searched; those of six bits and more and codebooks are rounded stochastically."""
    return type.supports_stochastic and not type.name.startswith(_LEFT_TO_ADAPTIVE)


def round_calibrated(
    rows: Bytes,
    type: GgmlType,
    delta: kernels.KernelDelta,
    v: Float32Array,
    d: Float32Array,
    *,
    key: int,
    imatrix: Float32Array | None = None,
    name: str = "the matrix",
) -> Calibrated:
    """Round ``W + delta`` for a whole matrix.

    Args:
        rows: the base's rows, (n_rows, row bytes).
        type: their type.
        delta: what is added.
        v: directions of the second moments, (RANK, n_in).
        d: the rest of their diagonal, (n_in,).
        key: seed of the order of the rows.
        imatrix: importance of the columns for the choice of scales.
        name: what messages call the rows.

    Raises:
        NonFiniteError: if a changed weight is NaN or infinite.
        QuantizationError: if the changed weights are too large for the type.
    """
    blocks = np.empty_like(rows)
    reached, _ = kernels.choose_scales(rows, type, blocks, delta, imatrix=imatrix)
    check_reached(name, type, *reached.sum(axis=0))
    factors = _factors(delta)
    v, d = _own_moments(v, d, factors)
    u = _kept_directions(v, d, factors)
    order = np.random.default_rng(key).permutation(len(rows)).astype(np.int32)
    base = dequantized(rows, type)

    def search(start: Bytes | None, gain: float, limits: Sequence[float]) -> tuple[float, float]:
        """Search from codes of ``start`` or the blocks' own; return what was reached and what is wanted."""
        kept = np.zeros_like(u) if limits is _FIT else u
        target = _target(rows, type, delta, gain)
        kernels.search_codes(start, type, blocks, target, v, d, kept, order, limits)
        del target  # it is as large as the matrix in F32
        new = dequantized(blocks, type)
        check_finite(name, type, new)
        return _reached(u, new - base, delta, v, d)

    scales = blocks.copy()
    share = _share(*search(rows, 1.0, _FIT))
    if share is not None and share >= _ENOUGH:
        gain = _gain(_share(*search(None, 1.0, _LATE)))
        search(None, gain, _FIT)
        search(None, gain, _LATE)
    else:
        blocks[:] = scales
        gain = _gain(_share(*search(rows, 1.0, _LIMITS)))
        if gain > 1:
            search(None, gain, _LIMITS)
        search(None, 1.0, _FIT)
    new = dequantized(blocks, type)
    moved, wanted = _reached(u, new - base, delta, v, d)
    return Calibrated(blocks, _sums(base, new, _target(rows, type, delta, 1.0)), moved, wanted)


def _share(moved: float, wanted: float) -> float | None:
    return moved / wanted if wanted > 0 else None


def _gain(share: float | None) -> float:
    """Return how far the target moves if a search reached a share; in 1/256, so that a sum's last bits do not count."""
    if share is None or not _REACHED[0] < share < _REACHED[1]:
        return 1.0
    return min(round(256 / share) / 256, _MOST_GAIN)


def check_reached(name: str, type: GgmlType, reached: float, wanted: float) -> None:
    """Raise ``QuantizationError`` unless chosen scales reach a delta; see `gguflora.quants.kernels.choose_scales`."""
    if not (np.isfinite(wanted) and reached >= LEAST_REACHED * wanted):
        raise _too_large(name, type)


def check_finite(name: str, type: GgmlType, values: Float32Array) -> None:
    """Raise ``QuantizationError`` unless new weights are finite: of a few blocks, scales may overflow."""
    if not np.isfinite(values).all():
        raise _too_large(name, type)


def _too_large(name: str, type: GgmlType) -> QuantizationError:
    return QuantizationError(
        f"{name}: the changed weights are too large for {type.name}; is the adapter's scale right?"
    )


def dequantized(rows: Bytes, type: GgmlType) -> Float32Array:
    """Return the weights of quantized rows."""
    values = np.empty((len(rows), rows.shape[1] // type.block_bytes * type.block_weights), np.float32)
    kernels.dequantize_rows(rows, type, values)
    return values


def _target(rows: Bytes, type: GgmlType, delta: kernels.KernelDelta, gain: float) -> Float32Array:
    """Return ``W + gain * delta``, the same on every machine."""
    factor = np.float32(gain)
    scaled = kernels.Product(delta.a, delta.b * factor) if isinstance(delta, kernels.Product) else delta * factor
    n_in = rows.shape[1] // type.block_bytes * type.block_weights
    target = np.empty((len(rows), n_in), np.float32)
    kernels.merge_rows(rows, type, target.view(np.uint8), _FLOAT, scaled)
    return target


def _factors(delta: kernels.KernelDelta) -> tuple[Float64Array, Float64Array]:
    """Return factors a (rank, n_in) and b (n_rows, rank) of a delta; of a dense one, of its largest directions."""
    if isinstance(delta, kernels.Product):
        return delta.a.astype(np.float64), delta.b.astype(np.float64)
    dense = delta.astype(np.float64)
    random = np.random.default_rng(0).standard_normal((dense.shape[1], min(_SKETCHED, *dense.shape)))
    b = np.linalg.qr(dense @ (dense.T @ (dense @ random)))[0]
    return b.T @ dense, b


def _own_moments(
    v: Float32Array, d: Float32Array, factors: tuple[Float64Array, Float64Array]
) -> tuple[Float32Array, Float32Array]:
    """Add the adapter's own input directions and a share of the identity; return v (DIRECTIONS, n_in) and d."""
    a, b = factors
    n_in = v.shape[1]
    mean = float((v.astype(np.float64) ** 2).sum() + d.astype(np.float64).sum()) / n_in
    mean = mean if mean > 0 else 1.0
    values, vectors = np.linalg.eigh(b.T @ b)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    _, directions = np.linalg.eigh(root @ (a @ a.T) @ root)
    own = directions[:, ::-1][:, : kernels.DIRECTIONS - RANK].T @ root @ a
    total = float((own**2).sum())
    own *= np.sqrt(_OWN * mean * n_in / total) if total > 0 else 0.0
    wide = np.zeros((kernels.DIRECTIONS, n_in), np.float32)
    wide[:RANK], wide[RANK : RANK + len(own)] = v, own
    return _coarse(wide), (d + np.float32(_IDENTITY * mean)).astype(np.float32)


def _kept_directions(v: Float32Array, d: Float32Array, factors: tuple[Float64Array, Float64Array]) -> Float32Array:
    """Return the largest output directions of delta H^(1/2), times sqrt(mu): (n_rows, KEPT)."""
    a, b = factors
    projected = a @ v.T.astype(np.float64)
    moments = projected @ projected.T + (a * d) @ a.T
    values, vectors = np.linalg.eigh(moments)
    root = vectors * np.sqrt(np.maximum(values, 0))
    _, directions = np.linalg.eigh(root.T @ (b.T @ b) @ root)
    found = b @ root @ directions[:, ::-1][:, : kernels.KEPT]
    norms = np.linalg.norm(found, axis=0)
    found = np.where(norms > 1e-6 * max(norms.max(initial=0.0), 1e-300), found / np.maximum(norms, 1e-300), 0.0)
    u = np.zeros((len(b), kernels.KEPT), np.float32)
    u[:, : found.shape[1]] = found * np.sqrt(MU)
    return _coarse(u)


def _coarse(values: Float32Array) -> Float32Array:
    """Drop the last bits, which depend on how a machine's linear algebra rounds."""
    rounded: Float32Array = ((values.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)
    return rounded


def _reached(
    u: Float32Array, moved: Float32Array, delta: kernels.KernelDelta, v: Float32Array, d: Float32Array
) -> tuple[float, float]:
    """Return what a change has of delta in the kept directions, and what delta itself has, both weighed by H."""
    if isinstance(delta, kernels.Product):
        wanted = (u.T.astype(np.float64) @ delta.b) @ delta.a.astype(np.float64)
    else:
        wanted = u.T.astype(np.float64) @ delta
    weighed = (wanted @ v.T.astype(np.float64)) @ v + wanted * d
    return float(((u.T @ moved) * weighed).sum()), float((wanted * weighed).sum())


def _sums(base: Float32Array, new: Float32Array, target: Float32Array) -> NDArray[np.float64]:
    """Return `kernels.SUMS`; nothing counts as clipped."""
    total = np.zeros(len(kernels.SUMS))
    for start in range(0, len(base), 64):
        w, after, wanted = (x[start : start + 64].astype(np.float64) for x in (base, new, target))
        delta = wanted - w
        sums: dict[str, Any] = {
            "weight2": (w**2).sum(),
            "delta2": (delta**2).sum(),
            "moved": ((after - w) * delta).sum(),
            "error2": ((after - wanted) ** 2).sum(),
            "clipped": 0.0,
        }
        total += [float(sums[name]) for name in kernels.SUMS]
    return total
