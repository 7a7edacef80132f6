"""OSF: the smallest singular triplets of the weight replaced (https://arxiv.org/abs/2504.07097; ``peft.tuners.osf``).

Tensors of a module: ``osf_svd_params.U_low`` (n_out, k), ``.S_low`` (k,), ``.V_low`` (k, n_in):
``W' = (W without its k smallest singular triplets) + U_low diag(S_low) V_low``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from gguflora.adapters.deltas import FunctionDelta, as_float64
from gguflora.adapters.numerics.spectrum import CAUTION, smallest
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices

_PARTS: Final = tuple(f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low"))


def read_osf(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, FunctionDelta]:
    """Read the delta of every adapted weight."""
    deltas = {}
    for module, parts in by_module(config, tensors, _PARTS).items():
        u, s, v = take(config, module, parts, *_PARTS)
        expect(config, module, _PARTS[1], s, (None,))
        expect(config, module, _PARTS[0], u, (None, len(s)))
        expect(config, module, _PARTS[2], v, (len(s), None))
        shape = len(u), v.shape[1]
        if len(s) > min(shape):
            raise AdapterError(
                f"{config.path.parent}: module {module!r} has {len(s)} singular triplets, but a weight of shape {shape}"
            )
        deltas[f"{module}.weight"] = FunctionDelta(shape, partial(_replace, u, s, v), whole=True, caution=CAUTION)
    return deltas


def _replace(u: Array, s: Array, v: Array, w: Float64Array, rows: Indices) -> Float64Array:
    new: Float64Array = (as_float64(u) * as_float64(s)) @ as_float64(v)
    return new - smallest(w, len(s))
