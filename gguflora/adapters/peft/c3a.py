"""C3A: the weight plus a matrix of circulant blocks (https://arxiv.org/abs/2407.19342; ``peft.tuners.c3a``).

Tensor of a module: ``c3a_kernel`` w, (n_out / b, n_in / b, b). Block (p, q) of the delta holds
``w[p, q, (column - row) mod b] / n_in``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from gguflora.adapters.deltas import FunctionDelta, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices


def read_c3a(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, FunctionDelta]:
    """Read the delta of every adapted weight."""
    deltas = {}
    for module, parts in by_module(config, tensors, ["c3a_kernel"]).items():
        (kernel,) = take(config, module, parts, "c3a_kernel")
        expect(config, module, "c3a_kernel", kernel, (None, None, None))
        down, across, block = kernel.shape
        deltas[f"{module}.weight"] = FunctionDelta((down * block, across * block), partial(_unroll, kernel))
    return deltas


def _unroll(kernel: Array, w: Float64Array, rows: Indices) -> Float64Array:
    _, across, block = kernel.shape
    shifted = (np.arange(block) - rows[:, None]) % block
    values = as_float64(kernel[rows // block])
    delta: Float64Array = np.take_along_axis(values, np.repeat(shifted[:, None], across, axis=1), axis=2) / w.shape[1]
    return delta.reshape(w.shape)
