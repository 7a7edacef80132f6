"""Bat, MISS with ``init_weights`` "bat": the weight's blocks times a matrix (https://arxiv.org/abs/2409.15371).

Tensor of a module: ``miss_block`` M, (n_out / r, r, r). For each block W[p, q], (r, r), of the weight,
``W'[p, q] = W[p, q] (I + M[p]) + M[p]`` (``peft.tuners.miss.layer``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from gguflora.adapters.deltas import Delta, FunctionDelta, ShapeDependentDelta, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices


def read_bat(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Delta | ShapeDependentDelta]:
    """Read the delta of every adapted weight."""
    deltas: dict[str, Delta | ShapeDependentDelta] = {}
    for module, parts in by_module(config, tensors, ["miss_block"]).items():
        (blocks,) = take(config, module, parts, "miss_block")
        expect(config, module, "miss_block", blocks, (None, None, None))
        if blocks.shape[1] != blocks.shape[2]:
            raise AdapterError(
                f"{config.path.parent}: module {module!r}: miss_block has shape {blocks.shape}, expected square blocks"
            )
        deltas[f"{module}.weight"] = _with_shape(config, module, blocks)
    return deltas


def _with_shape(config: PeftConfig, module: str, blocks: Array) -> ShapeDependentDelta:
    def build(shape: tuple[int, int]) -> Delta:
        if shape[1] % blocks.shape[1]:
            raise AdapterError(
                f"{config.path.parent}: module {module!r}: miss_block {blocks.shape} does not cover {shape[1]} columns"
            )
        return FunctionDelta(shape, partial(_multiply, blocks))

    return ShapeDependentDelta((blocks.shape[0] * blocks.shape[1], None), build)


def _multiply(blocks: Array, w: Float64Array, rows: Indices) -> Float64Array:
    size = blocks.shape[1]
    # M multiplies a row's columns, and the row of M at the row's position in its block is added to them
    matrices = as_float64(blocks[rows // size])
    parts = w.reshape(len(w), -1, size)
    delta: Float64Array = parts @ matrices + matrices[np.arange(len(w)), rows % size][:, None]
    return delta.reshape(w.shape)
