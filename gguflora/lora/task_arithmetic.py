"""The array arithmetic of PEFT's ``add_weighted_adapter``.

TIES: https://arxiv.org/abs/2306.01708; DARE: https://arxiv.org/abs/2311.03099. The semantics are those of PEFT's
``utils/merge_utils.py``: values are pruned first, signs are elected before values are weighted, and a sum of 0 elects
plus.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FloatingArray = NDArray[np.floating[Any]]
Mask = Callable[[int, tuple[int, ...]], NDArray[np.bool_]]
"""Returns the mask of values that DARE keeps, given the adapter's index and the array's shape."""

METHODS: Final = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
PRUNING: Final = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
SIGNS: Final = ("total", "frequency")


def combine_arrays(
    arrays: Sequence[FloatingArray], weights: Sequence[float], method: str, density: float, sign: str, mask: Mask
) -> FloatingArray:
    """Combine the arrays of several adapters into one.

    Args:
        arrays: one array for each adapter, all of the same shape.
        weights: weight of each adapter; may be negative.
        method: one of `METHODS`.
        density: share of the values that pruning keeps; not used by "linear".
        sign: how TIES elects a sign: by the "total" of the values, or by the "frequency" of their signs.
        mask: chooses the values that DARE keeps.
    """
    if method.startswith("dare_"):
        arrays = [_drop(array, density, mask(number, array.shape)) for number, array in enumerate(arrays)]
    elif method != "linear":
        arrays = [_keep_largest(array, density) for array in arrays]
    weighted = [array * array.dtype.type(weight) for array, weight in zip(arrays, weights, strict=True)]
    if not method.endswith("ties"):
        return _sum(weighted)
    agreed = _elect_signs(arrays, sign)
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
    """Keep the values of largest magnitude and set the others to 0."""
    if density >= 1:
        return array
    flat, kept = np.abs(array).reshape(-1), np.zeros(array.size, bool)
    count = int(density * array.size)
    if count:
        kept[np.argpartition(flat, array.size - count)[array.size - count :]] = True
    return array * kept.reshape(array.shape)


def _drop(array: FloatingArray, density: float, keep: NDArray[np.bool_]) -> FloatingArray:
    """Drop values at random and scale up the others, so that the expected sum stays the same."""
    return array if density >= 1 else array * keep / array.dtype.type(density)


def _elect_signs(arrays: Sequence[FloatingArray], sign: str) -> list[NDArray[np.bool_]]:
    """For each array, return the mask of values that have the elected sign."""
    votes = [np.sign(array) for array in arrays]
    elected = np.where(_sum(list(arrays) if sign == "total" else votes) >= 0, 1, -1)
    return [vote == elected for vote in votes]
