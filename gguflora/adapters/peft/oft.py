"""OFT: the weight's columns rotated in blocks (https://arxiv.org/abs/2306.07280, https://arxiv.org/abs/2506.19847).

Tensor of a module: ``oft_R.weight`` (n_in / b, b (b - 1) / 2), or (1, b (b - 1) / 2) where all blocks share it
(``block_share``): the upper triangles of skew-symmetric Q. A block of R is ``(I - Q) (I + Q)^-1``, or with
``use_cayley_neumann`` a series; ``W' = W R^T``. An embedding's is ``oft_embedding_R.weight`` with ``W' = W R``. With
``coft`` the norm of Q is at most ``eps / sqrt(blocks)`` (``peft.tuners.oft.layer``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from gguflora.adapters.deltas import Delta, FunctionDelta, ShapeDependentDelta, as_float64
from gguflora.adapters.numerics.rotation import cayley, cayley_neumann, rotate_columns
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices


@dataclass(frozen=True, slots=True, eq=False)
class _Rotation:
    """The parameters from which R is computed.

    Attributes:
        triangles: upper triangles of Q, (blocks, b (b - 1) / 2).
        size: block size b.
        terms: number of terms of the Neumann series; None for the exact inverse.
        bound: upper bound for the norm of each block's Q; None for no bound.
        inverse: whether ``W' = W R^T``; otherwise ``W' = W R``.
    """

    triangles: Array
    size: int
    terms: int | None
    bound: float | None
    inverse: bool


def read_oft(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, ShapeDependentDelta]:
    """Read the delta of every adapted weight."""
    deltas = {}
    for module, parts in by_module(config, tensors, ["oft_R", "oft_embedding_R"]).items():
        name = "oft_embedding_R" if "oft_embedding_R" in parts else "oft_R"
        (triangles,) = take(config, module, parts, name)
        expect(config, module, name, triangles, (None, None))
        deltas[f"{module}.weight"] = _with_shape(config, module, triangles, inverse=name == "oft_R")
    return deltas


def _with_shape(config: PeftConfig, module: str, triangles: Array, *, inverse: bool) -> ShapeDependentDelta:
    where = f"{config.path.parent}: module {module!r}"
    blocks, elements = triangles.shape
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    if size * (size - 1) // 2 != elements:
        raise AdapterError(f"{where}: oft_R has rows of {elements} numbers, expected a triangle of a square matrix")
    neumann = config.fields.get("use_cayley_neumann") in {None, True}
    rotation = _Rotation(
        triangles,
        size,
        int(config.number("num_cayley_neumann_terms", 5)) if neumann else None,
        config.number("eps", 6e-5) / math.sqrt(blocks) if config.flag("coft") else None,
        inverse,
    )

    def build(shape: tuple[int, int]) -> Delta:
        n_in = shape[1]
        fits = n_in % size == 0 if config.flag("block_share") and blocks == 1 else n_in == blocks * size
        if not fits:
            raise AdapterError(f"{where}: oft_R has {blocks} blocks of size {size}, which do not cover {n_in} columns")
        return FunctionDelta(shape, partial(_rotate, rotation))

    return ShapeDependentDelta((None, None), build)


def _rotate(rotation: _Rotation, w: Float64Array, rows: Indices) -> Float64Array:
    return rotate_columns(w, _blocks(rotation)) - w


@lru_cache(maxsize=4)  # reused for the next rows of the same weight
def _blocks(rotation: _Rotation) -> Float64Array:
    triangles, size = as_float64(rotation.triangles), rotation.size
    skew = np.zeros((len(triangles), size, size))
    above = np.triu_indices(size, 1)
    skew[:, *above] = triangles
    skew -= skew.swapaxes(1, 2)
    if rotation.bound is not None:
        norms = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
        skew *= np.minimum(1, rotation.bound / np.maximum(norms, np.finfo(np.float64).tiny))
    blocks = cayley(skew) if rotation.terms is None else cayley_neumann(skew, rotation.terms)
    return blocks if rotation.inverse else blocks.swapaxes(1, 2)
