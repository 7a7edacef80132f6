"""BOFT: the weight's columns rotated by a product of butterflies (https://arxiv.org/abs/2311.06243).

Tensors of a module: ``boft_R`` (factors, n_in / b, b, b) and ``boft_s`` (n_out, 1). A block X of a factor stands for
the rotation ``(I - K) (I + K)^-1`` with ``K = (X - X^T) / 2``; the factor is the block-diagonal matrix of its blocks
with rows and columns permuted. ``W' = s * (R W^T)^T`` where R is the last factor times ... times the first
(``peft.tuners.boft.layer``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from gguflora.adapters.deltas import FunctionDelta, as_float64
from gguflora.adapters.numerics.rotation import cayley, rotate_columns
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices


@dataclass(frozen=True, slots=True, eq=False)
class _Butterflies:
    blocks: Array
    scale: Array


def read_boft(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, FunctionDelta]:
    """Read the delta of every adapted weight."""
    deltas = {}
    for module, parts in by_module(config, tensors, ["boft_R", "boft_s"]).items():
        blocks, scale = take(config, module, parts, "boft_R", "boft_s")
        expect(config, module, "boft_s", scale, (None, 1))
        expect(config, module, "boft_R", blocks, (None, None, None, blocks.shape[-2]))
        factors, count, size, _ = blocks.shape
        if factors > 1 and (size % 2 or count % (1 << (factors - 1))):
            raise AdapterError(
                f"{config.path.parent}: module {module!r}: boft_R has shape {blocks.shape}: its {factors} butterfly "
                f"factors need blocks of an even size, and a multiple of {1 << (factors - 1)} of them"
            )
        shape = len(scale), count * size
        deltas[f"{module}.weight"] = FunctionDelta(shape, partial(_rotate, _Butterflies(blocks, scale)))
    return deltas


def _rotate(butterflies: _Butterflies, w: Float64Array, rows: Indices) -> Float64Array:
    rotations = _rotations(butterflies)
    rotated = w
    for factor, blocks in enumerate(rotations):
        order = _butterfly(factor, blocks.shape, len(rotations))
        back = np.argsort(order)
        rotated = rotate_columns(rotated[:, back], blocks)[:, order]
    return as_float64(butterflies.scale[rows]) * rotated - w


@lru_cache(maxsize=4)  # reused for the next rows of the same weight
def _rotations(butterflies: _Butterflies) -> Float64Array:
    x = as_float64(butterflies.blocks)
    return cayley((x - x.swapaxes(-1, -2)) / 2)


def _butterfly(factor: int, shape: tuple[int, ...], factors: int) -> Indices:
    """Return the permutation of a factor: in each group of 2^factor blocks the even half-blocks, then the odd ones."""
    count, size, _ = shape
    columns = np.arange(count * size)
    if factors == 1:
        return columns
    groups = columns.reshape(count >> factor, -1, 2, size // 2)
    return groups.swapaxes(1, 2).reshape(-1)
