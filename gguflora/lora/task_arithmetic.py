"""The array arithmetic of TIES (https://arxiv.org/abs/2306.01708) and DARE (https://arxiv.org/abs/2311.03099).

The papers leave open how weights of adapters enter, and there are two conventions. PEFT's ``add_weighted_adapter``
(``utils/merge_utils.py``) elects signs before values are weighted, divides the sum of the agreeing values by their
number, and rescales what DARE keeps by 1 / density. mergekit (0.1.5: ``generalized_task_arithmetic.py``,
``sparsify.py``) weights first, divides TIES' sum by the sum of the agreeing weights and DARE's not at all, and rescales
what DARE keeps so that the sum of magnitudes stays. In both, values are pruned first and a sum of 0 elects plus.
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
_NO_SUM: Final = 1e-7
"""mergekit's least sum of magnitudes that is rescaled."""
CONVENTIONS: Final = ("peft", "mergekit")


def combine_arrays(
    arrays: Sequence[FloatingArray],
    weights: Sequence[float],
    method: str,
    density: float,
    sign: str,
    mask: Mask,
    convention: str = "peft",
) -> FloatingArray:
    """Combine the arrays of several adapters into one.

    Args:
        arrays: one array for each adapter, all of the same shape.
        weights: weight of each adapter; may be negative.
        method: one of `METHODS`.
        density: share of the values that pruning keeps; not used by "linear".
        sign: how TIES elects a sign: by the "total" of the values, or by the "frequency" of their signs.
        mask: chooses the values that DARE keeps.
        convention: one of `CONVENTIONS`, for TIES and DARE.
    """
    by_weight = convention == "mergekit"
    if method.startswith("dare_"):
        drop = _drop_keeping_sum if by_weight else _drop
        arrays = [drop(array, density, mask(number, array.shape)) for number, array in enumerate(arrays)]
    elif method != "linear":
        arrays = [_keep_largest(array, density) for array in arrays]
    weighted = [array * array.dtype.type(weight) for array, weight in zip(arrays, weights, strict=True)]
    if not method.endswith("ties"):
        return _sum(weighted)
    agreed = _elect_signs(weighted if by_weight else arrays, sign)
    kept = _sum([array * keep for array, keep in zip(weighted, agreed, strict=True)])
    if by_weight:
        return kept if method.startswith("dare_") else kept / _sum_of_weights(agreed, weights, kept.dtype)
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


def _drop_keeping_sum(array: FloatingArray, density: float, keep: NDArray[np.bool_]) -> FloatingArray:
    """Drop values at random and scale up the others, so that the sum of the magnitudes stays the same."""
    if density >= 1:
        return array
    kept = array * keep
    before, after = (float(np.abs(values).sum(dtype=np.float64)) for values in (array, kept))
    return kept * array.dtype.type(before / after) if min(before, after) > _NO_SUM else kept


def _sum_of_weights(
    agreed: Sequence[NDArray[np.bool_]], weights: Sequence[float], dtype: np.dtype[Any]
) -> FloatingArray:
    """Return the sum of the weights of the arrays that agree, and 1 where it is 0."""
    total = np.zeros(agreed[0].shape, dtype)
    for keep, weight in zip(agreed, weights, strict=True):
        total += keep * dtype.type(weight)
    total[total == 0] = 1
    return total


def _elect_signs(arrays: Sequence[FloatingArray], sign: str) -> list[NDArray[np.bool_]]:
    """For each array, return the mask of values that have the elected sign."""
    votes = [np.sign(array) for array in arrays]
    elected = np.where(_sum(list(arrays) if sign == "total" else votes) >= 0, 1, -1)
    return [vote == elected for vote in votes]
