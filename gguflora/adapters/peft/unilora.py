"""UNILORA: LoRA whose factors take their numbers from one short vector (https://arxiv.org/abs/2506.00799).

Source: PEFT, tuners/unilora. All modules share ``base_model.unilora_theta_d`` (d). An element of a factor is
``theta[index] / sqrt(count[index])``, where count is the number of uses of an index in all factors. With
``save_indices`` a module has ``unilora_indices_A``, ``unilora_scales_A`` (r, n_in) and the same for B (n_out, r).
Otherwise the indices come from numpy's generator seeded with ``proj_seed``, and are assigned to the modules in the
model's order, first to A, then to B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from gguflora.adapters.base_shapes import BaseShapes
from gguflora.adapters.deltas import Delta, LowRank, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import (
    by_module,
    expect,
    split_shared,
    take,
)
from gguflora.adapters.peft.target_modules import is_target
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices

_THETA: Final = "unilora_theta_d"
_PARTS: Final = ("unilora_indices_A", "unilora_scales_A", "unilora_indices_B", "unilora_scales_B")


def read_unilora(config: PeftConfig, tensors: Mapping[str, Array], base: BaseShapes) -> dict[str, Delta]:
    """Read the delta of every adapted weight."""
    shared, own = split_shared(config, tensors, [_THETA])
    (saved,) = take(config, "base_model", shared, _THETA)
    theta = as_float64(expect(config, "base_model", _THETA, saved, (None,)))
    if not own:
        return _with_random_indices(config, theta, base)
    deltas: dict[str, Delta] = {}
    for module, parts in by_module(config, own, _PARTS).items():
        indices_a, scales_a, indices_b, scales_b = take(config, module, parts, *_PARTS)
        for indices, scales in ((indices_a, scales_a), (indices_b, scales_b)):
            if indices.shape != scales.shape or indices.ndim != 2 or indices.dtype.kind not in "iu":
                raise AdapterError(f"{config.path.parent}: module {module!r}: indices and scales do not fit together")
            if indices.size and not 0 <= indices.min() <= indices.max() < len(theta):
                raise AdapterError(f"{config.path.parent}: module {module!r}: indices exceed {_THETA}'s {len(theta)}")
        a, b = theta[indices_a] * as_float64(scales_a), theta[indices_b] * as_float64(scales_b)
        deltas[f"{module}.weight"] = LowRank(a, b, 1.0)
    return deltas


def _with_random_indices(config: PeftConfig, theta: Float64Array, base: BaseShapes) -> dict[str, Delta]:
    rank = config.integer("r", 4, minimum=1)
    weights = [f"{module}.weight" for module in base.linear_modules() if is_target(config, module)]
    shapes = {weight: base.shape(weight) for weight in weights}
    if not shapes:
        raise AdapterError(f"{config.path}: target_modules names no module of the base; is it the right base?")
    indices = _draw(config, rank * sum(n_out + n_in for n_out, n_in in shapes.values()), len(theta))
    scaled = theta / np.sqrt(np.maximum(np.bincount(indices, minlength=len(theta)), 1))
    deltas: dict[str, Delta] = {}
    start = 0
    for weight, (n_out, n_in) in shapes.items():
        middle, stop = start + rank * n_in, start + rank * (n_in + n_out)
        a, b = scaled[indices[start:middle]].reshape(rank, n_in), scaled[indices[middle:stop]].reshape(n_out, rank)
        deltas[weight], start = LowRank(a, b, 1.0), stop
    return deltas


def _draw(config: PeftConfig, n: int, n_choices: int) -> Indices:
    """Draw ``n`` indices in random order; each occurs equally often, up to a difference of one."""
    generator = np.random.default_rng(config.integer("proj_seed", 42, minimum=0))
    indices = np.repeat(np.arange(n_choices), n // n_choices)
    if n % n_choices:
        indices = np.concatenate([indices, generator.choice(n_choices, size=n % n_choices, replace=False)])
    generator.shuffle(indices)
    return indices
