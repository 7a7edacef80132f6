"""FRoD: the weight in a basis that layers share, times a sparse matrix (https://doi.org/10.1609/aaai.v40i31.39813).

Modules with the same role share V (n_in, n_in), ``base_model.frod_V.<role>``, and the positions of the entries of a
sparse S, ``frod_s_indices.<role>`` (2, n) and ``frod_s_size.<role>``. A module has ``frod_lambda_s_values`` (n,), the
values of S, and ``frod_lambda_l`` l, (n_in,). Then ``W' = U (S + diag(l)) V^T``, where U is ``W V^-T`` with its columns
scaled to length 1 (``peft.tuners.frod``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

import numpy as np

from gguflora.adapters.deltas import ShapeDependentDelta, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import (
    SHARED_PREFIX,
    by_module,
    expect,
    take,
)
from gguflora.errors import AdapterError, UnsupportedAdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices

_PARTS: Final = ("frod_lambda_l", "frod_lambda_s_values")
_SHARED: Final = tuple(f"{SHARED_PREFIX}{name}." for name in ("frod_V", "frod_s_indices", "frod_s_size"))
_SHORTEST: Final = 1e-12


def read_frod(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, ShapeDependentDelta]:
    """Read the delta of every adapted weight.

    Raises:
        UnsupportedAdapterError: if V was not saved. It cannot be recomputed, as it depends on the signs of a
            decomposition.
    """
    shared = {name: tensor for name, tensor in tensors.items() if name.startswith(_SHARED)}
    module_tensors = {name: tensor for name, tensor in tensors.items() if name not in shared}
    deltas = {}
    for module, parts in by_module(config, module_tensors, _PARTS).items():
        role = _role(module)
        missing = [name for name in _SHARED[:2] if name + role not in shared]
        if missing:
            raise UnsupportedAdapterError(
                f"{config.path.parent}: has no {missing[0]}{role}, which cannot be computed from the base; save the "
                "adapter with save_projection=True"
            )
        v, places = (shared[name + role] for name in _SHARED[:2])
        diagonal, values = take(config, module, parts, *_PARTS)
        width = expect(config, module, "frod_V", v, (None, v.shape[0])).shape[0]
        expect(config, module, _PARTS[0], diagonal, (width,))
        expect(config, module, _PARTS[1], values, (None,))
        if places.shape != (2, len(values)) or (places.size and not (places.min() >= 0 and places.max() < width)):
            raise AdapterError(f"{config.path.parent}: frod_s_indices.{role} does not fit module {module!r}")
        function = partial(_rebuild, v, places, values, diagonal)
        deltas[f"{module}.weight"] = ShapeDependentDelta.formula((None, width), function, whole=True)
    return deltas


def _role(module: str) -> str:
    """Return PEFT's name for the modules that share V: the last two parts of the path, without the layer number."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _rebuild(v: Array, places: Array, values: Array, diagonal: Array, w: Float64Array, rows: Indices) -> Float64Array:
    basis = as_float64(v)
    try:
        u = np.linalg.solve(basis, w.T).T
    except np.linalg.LinAlgError:
        u = w @ np.linalg.pinv(basis, rcond=1e-6).T
    lengths = np.linalg.norm(u, axis=0)
    u = np.divide(u, lengths, out=np.zeros_like(u), where=lengths > _SHORTEST)
    inner = np.diag(as_float64(diagonal))
    np.add.at(inner, tuple(places), as_float64(values))
    delta: Float64Array = u @ inner @ basis.T - w
    return delta
