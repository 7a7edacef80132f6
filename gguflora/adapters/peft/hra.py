"""HRA: the weight times a chain of Householder reflections (https://arxiv.org/abs/2405.17484; ``peft.tuners.hra``).

Tensor of a module: ``hra_u`` (n_in, r). With its columns u_k scaled to length 1,
``W' = W (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T)``. With ``apply_GS`` the columns are first made orthonormal
(Gram-Schmidt).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from gguflora.adapters.deltas import ShapeDependentDelta, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices


def read_hra(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, ShapeDependentDelta]:
    """Read the delta of every adapted weight."""
    deltas = {}
    for module, parts in by_module(config, tensors, ["hra_u"]).items():
        (vectors,) = take(config, module, parts, "hra_u")
        u = as_float64(expect(config, module, "hra_u", vectors, (None, None)))
        lengths = np.linalg.norm(u, axis=0)
        if not lengths.all():
            raise AdapterError(
                f"{config.path.parent}: module {module!r}: a column of hra_u is 0, expected vectors with a direction"
            )
        u = u / lengths
        function = partial(_reflect_once, np.linalg.qr(u)[0]) if config.flag("apply_GS") else partial(_reflect, u)
        deltas[f"{module}.weight"] = ShapeDependentDelta.formula((None, u.shape[0]), function)
    return deltas


def _reflect(u: Float64Array, w: Float64Array, rows: Indices) -> Float64Array:
    changed = w.copy()
    for column in u.T:
        changed -= 2 * np.outer(changed @ column, column)
    return changed - w


def _reflect_once(q: Float64Array, w: Float64Array, rows: Indices) -> Float64Array:
    """Apply all reflections at once, which is equivalent because the columns of q are orthonormal."""
    delta: Float64Array = -2 * (w @ q) @ q.T
    return delta
