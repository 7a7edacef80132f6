"""IA3: rows or columns of the weight times learned numbers (https://arxiv.org/abs/2205.05638; ``peft.tuners.ia3``).

Tensor of a module: ``ia3_l`` (n_out, 1) for ``W' = l * W`` and ``b' = l * b``; for a module that matches
``feedforward_modules``, (1, n_in) for ``W' = W * l``. The same holds for Conv1D.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from gguflora.adapters.deltas import ShapeDependentDelta, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, take
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array, is_float
from gguflora.quants.arrays import Float64Array, Indices


def read_ia3(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, ShapeDependentDelta]:
    """Read the delta of every adapted weight, and of its bias if the base has one."""
    deltas = {}
    for module, parts in by_module(config, tensors, ["ia3_l"]).items():
        (scale,) = take(config, module, parts, "ia3_l")
        if scale.ndim != 2 or 1 not in scale.shape or not is_float(scale):
            raise AdapterError(
                f"{config.path.parent}: module {module!r}: ia3_l has shape {scale.shape} and type {scale.dtype}, "
                "expected numbers of shape (n_out, 1) or (1, n_in)"
            )
        if scale.shape[0] == 1 != scale.shape[1]:
            deltas[f"{module}.weight"] = ShapeDependentDelta.formula(
                (None, scale.shape[1]), partial(_scale_columns, scale)
            )
            continue
        deltas[f"{module}.weight"] = ShapeDependentDelta.formula((scale.shape[0], None), partial(_scale_rows, scale))
        deltas[f"{module}.bias"] = ShapeDependentDelta.formula(
            (scale.shape[0], 1), partial(_scale_rows, scale), optional=True
        )
    return deltas


def _scale_rows(scale: Array, w: Float64Array, rows: Indices) -> Float64Array:
    delta: Float64Array = (as_float64(scale[rows]) - 1) * w
    return delta


def _scale_columns(scale: Array, w: Float64Array, rows: Indices) -> Float64Array:
    delta: Float64Array = (as_float64(scale) - 1) * w
    return delta
