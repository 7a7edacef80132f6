"""Parts of a base's weight by its singular values, which some methods change before their training begins."""

from __future__ import annotations

from typing import Final

import numpy as np

from gguflora.quants.arrays import Float64Array

CAUTION: Final = (
    "the adapter refers to the SVD or QR factors of the base's weights, which are rebuilt from quantized ones: the "
    "result is only close to what was trained; merge into an F32, F16 or BF16 base and quantize afterwards"
)


def largest(w: Float64Array, count: int) -> Float64Array:
    """The sum of the ``count`` largest singular triplets of a matrix."""
    u, s, v = np.linalg.svd(w, full_matrices=False)
    top: Float64Array = (u[:, :count] * s[:count]) @ v[:count]
    return top


def smallest(w: Float64Array, count: int) -> Float64Array:
    """The sum of the ``count`` smallest singular triplets of a matrix (of min(n_out, n_in) in all)."""
    u, s, v = np.linalg.svd(w, full_matrices=False)
    keep = len(s) - count
    rest: Float64Array = (u[:, keep:] * s[keep:]) @ v[keep:]
    return rest
