"""TINYLORA: ``W' = W + B (sum_k v_k P_k) A`` (https://arxiv.org/abs/2602.04118; PEFT: tuners/tinylora).

A module has ``tinylora_A`` (r, n_in) and ``tinylora_B`` (n_out, r), from the base's singular vectors, and
``tinylora_P`` (u, r, r). Without ``save_projection`` P is drawn from a normal distribution with variance 1 / r, with a
generator seeded with ``projection_seed`` plus the module's number. Modules share the trained vectors
``base_model.tinylora_v.<j>`` (u): with ``weight_tying`` t, n modules have about ``n (1 - t)`` vectors, and consecutive
modules share one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

import numpy as np

from gguflora.adapters.deltas import Delta, LowRank, as_float64
from gguflora.adapters.numerics.torch_rng import TorchGenerator
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import (
    Parts,
    by_module,
    expect,
    take,
)
from gguflora.adapters.peft.module_order import in_order
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array

_VECTOR: Final = re.compile(r"(?:base_model\.)?tinylora_v(?:\.[^.]+)?\.(\d+)")
_PROJECTION: Final = "tinylora_P"


def read_tinylora(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Delta]:
    """Read the delta of every adapted weight."""
    vectors = {int(found[1]): tensors[key] for key in tensors if (found := _VECTOR.fullmatch(key))}
    own = {key: tensor for key, tensor in tensors.items() if not _VECTOR.fullmatch(key)}
    modules = by_module(config, own, ["tinylora_A", "tinylora_B", _PROJECTION])
    deltas: dict[str, Delta] = {}
    for number, module in enumerate(in_order(config, list(modules))):
        group = _group(config, number, len(modules))
        if group not in vectors:
            raise AdapterError(f"{config.path.parent}: module {module!r} needs tinylora_v.{group}, which is missing")
        expect(config, module, f"tinylora_v.{group}", vectors[group], (None,))
        deltas[f"{module}.weight"] = _read_module(config, module, modules[module], as_float64(vectors[group]), number)
    return deltas


def _group(config: PeftConfig, number: int, n_modules: int) -> int:
    """Return the number of the vector that a module uses."""
    n_groups = max(1, round(n_modules * (1.0 - config.number("weight_tying", 0.0))))
    return min(number // max(1, n_modules // n_groups), n_groups - 1)


def _read_module(config: PeftConfig, module: str, parts: Parts, vector: Float64Array, number: int) -> LowRank:
    projection = parts.pop(_PROJECTION, None)
    a, b = take(config, module, parts, "tinylora_A", "tinylora_B")
    expect(config, module, "tinylora_A", a, (None, None))
    rank = a.shape[0]
    expect(config, module, "tinylora_B", b, (None, rank))
    if projection is None:
        generator = TorchGenerator(config.integer("projection_seed", 42) + number)
        projection = generator.normal((len(vector), rank, rank), std=1.0 / math.sqrt(rank))
    expect(config, module, _PROJECTION, projection, (len(vector), rank, rank))
    core = np.tensordot(vector, as_float64(projection), axes=1)
    return LowRank(a, as_float64(b) @ core, 1.0)
