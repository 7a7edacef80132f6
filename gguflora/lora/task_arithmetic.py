"""The arithmetic of PEFT's ``add_weighted_adapter`` on the same array of several adapters.

TIES: https://arxiv.org/abs/2306.01708; DARE: https://arxiv.org/abs/2311.03099; semantics as in PEFT's
``utils/merge_utils.py``: values are pruned first, signs elected before and not after they are weighted, a sum of 0
elects plus.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FloatingArray = NDArray[np.floating[Any]]
Mask = Callable[[int, tuple[int, ...]], NDArray[np.bool_]]
"""From the number of an adapter and a shape to which values DARE keeps."""

METHODS: Final = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
PRUNING: Final = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
SIGNS: Final = ("total", "frequency")


def combine_arrays(
    arrays: Sequence[FloatingArray], weights: Sequence[float], method: str, density: float, sign: str, mask: Mask
) -> FloatingArray:
    """One array of several.

    Args:
        arrays: of one shape, one of each adapter.
        weights: of the adapters; may be negative.
        method: one of `METHODS`.
        density: share of the values that pruning keeps; not used by "linear".
        sign: how TIES elects a sign: by the "total" of the values, or by their "frequency".
        mask: for DARE, which values are kept.
    """
    if method.startswith("dare_"):
        arrays = [_drop(array, density, mask(number, array.shape)) for number, array in enumerate(arrays)]
    elif method != "linear":
        arrays = [_keep_largest(array, density) for array in arrays]
    weighted = [array * array.dtype.type(weight) for array, weight in zip(arrays, weights, strict=True)]
    if not method.endswith("ties"):
        return _sum(weighted)
    agreed = _majority(arrays, sign)
    kept = _sum([array * keep for array, keep in zip(weighted, agreed, strict=True)])
    count = np.maximum(np.sum(agreed, axis=0), 1)
    mean: FloatingArray = (kept / count).astype(kept.dtype)
    return mean


def _sum(arrays: Sequence[FloatingArray]) -> FloatingArray:
    total = arrays[0].copy()
    for array in arrays[1:]:
        total += array
    return total


def _keep_largest(array: FloatingArray, density: float) -> FloatingArray:
    """The values of largest magnitude, the others 0."""
    if density >= 1:
        return array
    flat, kept = np.abs(array).reshape(-1), np.zeros(array.size, bool)
    count = int(density * array.size)
    if count:
        kept[np.argpartition(flat, array.size - count)[array.size - count :]] = True
    return array * kept.reshape(array.shape)


def _drop(array: FloatingArray, density: float, keep: NDArray[np.bool_]) -> FloatingArray:
    """Values dropped at random, the others made larger so that the expected sum stays."""
    return array if density >= 1 else array * keep / array.dtype.type(density)


def _majority(arrays: Sequence[FloatingArray], sign: str) -> list[NDArray[np.bool_]]:
    """Where each array has the sign that most have."""
    votes = [np.sign(array) for array in arrays]
    elected = np.where(_sum(list(arrays) if sign == "total" else votes) >= 0, 1, -1)
    return [vote == elected for vote in votes]
