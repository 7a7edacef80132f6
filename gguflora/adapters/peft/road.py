"""RoAd: pairs of rows rotated and scaled (https://arxiv.org/abs/2409.00119; ``peft.tuners.road``).

The rows of a weight lie in groups of ``group_size``; row i of a group's first half, y1, and row i of its second half,
y2, are a pair: ``y1' = c1 y1 - s1 y2`` and ``y2' = c2 y2 + s2 y1``, of the weight and the bias alike, where
``c = alpha cos(theta)``, ``s = alpha sin(theta)``. Tensors of a module: ``road_theta`` and ``road_alpha``, each with
one number per pair (``road_1``), one per row (``road_2``), or two per row (``road_4``: for each group first all numbers
for c, then all for s).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

import numpy as np

from gguflora.adapters.deltas import ShapeDependentDelta, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices

# numbers per row
_VARIANTS: Final = {"road_1": 0.5, "road_2": 1, "road_4": 2}


def read_road(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, ShapeDependentDelta]:
    """Read the delta of every adapted weight, and of its bias if the base has one."""
    variant, group = config.fields.get("variant", "road_1"), config.number("group_size", 64)
    if variant not in _VARIANTS:
        raise config.error("variant", "one of " + ", ".join(_VARIANTS), variant)
    if group != int(group) or group < 2 or group % 2:
        raise config.error("group_size", "an even whole number", group)
    deltas = {}
    for module, parts in by_module(config, tensors, ["road_theta", "road_alpha"]).items():
        theta, alpha = take(config, module, parts, "road_theta", "road_alpha")
        expect(config, module, "road_theta", theta, (None,))
        expect(config, module, "road_alpha", alpha, theta.shape)
        n_out = int(len(theta) / _VARIANTS[variant])
        if n_out % group or n_out * _VARIANTS[variant] != len(theta):
            raise AdapterError(
                f"{config.path.parent}: module {module!r}: road_theta has {len(theta)} numbers, which cannot be "
                f"divided among groups of {group:g} rows"
            )
        function = partial(_rotate, *_columns(variant, int(group), as_float64(theta), as_float64(alpha)), int(group))
        deltas[f"{module}.weight"] = ShapeDependentDelta.formula((n_out, None), function, whole=True)
        deltas[f"{module}.bias"] = ShapeDependentDelta.formula((n_out, 1), function, whole=True, optional=True)
    return deltas


def _columns(variant: str, group: int, theta: Float64Array, alpha: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return c and s of every row, as columns."""
    c, s = alpha * np.cos(theta), alpha * np.sin(theta)
    if variant == "road_1":
        c, s = (np.repeat(part.reshape(-1, 1, group // 2), 2, axis=1) for part in (c, s))
    elif variant == "road_4":
        c, s = c.reshape(-1, 2, group)[:, 0], s.reshape(-1, 2, group)[:, 1]
    return c.reshape(-1, 1), s.reshape(-1, 1)


def _rotate(c: Float64Array, s: Float64Array, group: int, w: Float64Array, rows: Indices) -> Float64Array:
    pairs = w.reshape(-1, 2, group // 2, w.shape[1])
    rotated = np.stack([-pairs[:, 1], pairs[:, 0]], axis=1).reshape(w.shape)
    delta: Float64Array = (c - 1) * w + s * rotated
    return delta
