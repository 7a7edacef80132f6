"""Parts of a weight by its singular values, which some methods replace before training."""

from __future__ import annotations

from typing import Final

import numpy as np

from gguflora.quants.arrays import Float64Array

CAUTION: Final = (
    "the adapter depends on the SVD or QR decomposition of the base's weights, which is computed from quantized ones: "
    "the result is only close to the trained model; merge into an F32, F16 or BF16 base and quantize afterwards"
)


def largest(w: Float64Array, count: int) -> Float64Array:
    """Return the sum of the ``count`` largest singular triplets of a matrix."""
    u, s, v = np.linalg.svd(w, full_matrices=False)
    top: Float64Array = (u[:, :count] * s[:count]) @ v[:count]
    return top


def smallest(w: Float64Array, count: int) -> Float64Array:
    """Return the sum of the ``count`` smallest of the min(n_out, n_in) singular triplets of a matrix."""
    u, s, v = np.linalg.svd(w, full_matrices=False)
    keep = len(s) - count
    rest: Float64Array = (u[:, keep:] * s[keep:]) @ v[keep:]
    return rest
