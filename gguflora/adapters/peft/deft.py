"""DEFT: the weight's projection to a learned subspace replaced (``peft.tuners.deft``).

Tensors of a module: ``deft_P`` (n_out, r) and, without ``para``, ``deft_R`` (r, n_in). Then
``W' = W + Q (s R - L^T W)``, or with ``para`` (PaRa) ``W' = W - Q L^T W``. For ``decomposition_method`` "relu" Q = P
and L = relu(P), for "qr" Q = L = the orthonormal factor of P; s is alpha / r, or 1 without ``alpha``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from gguflora.adapters.deltas import ShapeDependentDelta, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices


def read_deft(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, ShapeDependentDelta]:
    """Read the delta of every adapted weight."""
    method = config.fields.get("decomposition_method", "relu")
    if method not in {"relu", "qr"}:
        raise config.error("decomposition_method", "'relu' or 'qr'", method)
    names = ["deft_P"] if config.flag("para") else ["deft_P", "deft_R"]
    deltas = {}
    for module, parts in by_module(config, tensors, ["deft_P", "deft_R"]).items():
        p, *injected = take(config, module, parts, *names)
        n_out, rank = expect(config, module, "deft_P", p, (None, None)).shape
        for r in injected:
            expect(config, module, "deft_R", r, (rank, None))
        scale = config.number("alpha", 0) / rank if config.fields.get("alpha") else 1.0
        known = n_out, (injected[0].shape[1] if injected else None)
        function = partial(_refill, p, injected[0] if injected else None, scale, method == "qr")
        deltas[f"{module}.weight"] = ShapeDependentDelta.formula(known, function, whole=True)
    return deltas


def _refill(
    p: Array, injected: Array | None, scale: float, orthonormal: bool, w: Float64Array, rows: Indices
) -> Float64Array:
    q = np.linalg.qr(as_float64(p))[0] if orthonormal else as_float64(p)
    left = q if orthonormal else np.maximum(q, 0)
    removed = left.T @ w
    delta: Float64Array = q @ (-removed if injected is None else scale * as_float64(injected) - removed)
    return delta
