"""Orthogonal blocks by the Cayley transform, and the product of a weight with them, for OFT and BOFT."""

from __future__ import annotations

import numpy as np

from gguflora.quants.arrays import Float64Array


def cayley(skew: Float64Array) -> Float64Array:
    """Return the orthogonal matrices ``(I - Q) (I + Q)^-1`` for skew-symmetric matrices Q, (blocks, b, b)."""
    unit = np.eye(skew.shape[-1])
    # X (I + Q) = I - Q is solved in its transposed form, with Q^T = -Q
    rotation: Float64Array = np.linalg.solve(unit - skew, unit + skew).astype(np.float64).swapaxes(-1, -2)
    return rotation


def cayley_neumann(skew: Float64Array, terms: int) -> Float64Array:
    """Return PEFT's Neumann series for ``cayley(-Q)``: ``I + 2 Q + ... + 2 Q^(terms - 2) + Q^(terms - 1)``.

    As in PEFT, two terms give ``I + 2 Q``, and three terms give the same as four.
    """
    rotation: Float64Array = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy()
    last = max(terms, 4) - 1 if terms > 2 else terms - 1
    power = rotation.copy()
    for exponent in range(1, last + 1):
        power = power @ skew
        rotation += power if exponent == last > 1 else 2 * power
    return rotation


def rotate_columns(w: Float64Array, blocks: Float64Array) -> Float64Array:
    """Return ``w @ R^T`` with a block-diagonal R, whose blocks are (k, b, b), or (1, b, b) if all are the same."""
    size = blocks.shape[-1]
    parts = w.reshape(len(w), -1, size).swapaxes(0, 1)
    rotated: Float64Array = (parts @ blocks.swapaxes(-1, -2)).swapaxes(0, 1)
    return rotated.reshape(w.shape)
