"""Predict from a delta and the steps of its quant type how a merge will go: numbers for reports and warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gguflora import quants
from gguflora.errors import NonFiniteError
from gguflora.placement.base_weights import BaseTensors, WholeTensorDeltas, read_or_zeros
from gguflora.placement.rows import LowRankRows, split_rows
from gguflora.placement.target import ChangedTensor
from gguflora.quants import kernels
from gguflora.quants.types import type_named

_ROWS: Final = 32
"""Rows of each tensor that are looked at, evenly spaced."""

_FLOAT: Final = type_named("F32")


@dataclass(frozen=True, slots=True)
class Steps:
    """A delta beside the steps of its tensor's type.

    Attributes:
        weights: number of weights of the tensor.
        delta: mean of |delta|.
        step: mean distance of neighbouring levels.
        weight: root mean square of the weights.
    """

    weights: int
    delta: float
    step: float
    weight: float

    @property
    def delta_per_step(self) -> float:
        """The mean of |delta| in steps; 0 if the type has no step here."""
        return self.delta / self.step if self.step else 0.0

    @property
    def predicted_noise(self) -> float:
        """The norm of the noise of stochastic rounding over that of the base's own quantization error.

        A delta of a share f of a step is rounded with a variance of f (1 - f) steps squared; an even quantization error
        has 1/12.
        """
        return math.sqrt(12 * self._variance)

    @property
    def noise(self) -> float:
        """The root mean square of the noise of stochastic rounding."""
        return math.sqrt(self._variance) * self.step

    @property
    def _variance(self) -> float:
        share = min(self.delta_per_step, 0.5)
        return share * (1 - share)


def steps_of(weights: BaseTensors, target: ChangedTensor) -> Steps | None:
    """Measure a delta in steps on a sample of rows.

    Returns:
        None if the output has no steps (floats and codebook types) or another type, or the delta is not low-rank.
    """
    if target.type != target.source.type or len(target.shape) < 2 or not kernels.has_steps(target.type):
        return None
    deltas, steps, energies = [], [], []
    for rows in split_rows(target, WholeTensorDeltas(weights, [target])):
        if not isinstance(rows, LowRankRows):
            if rows.deltas:
                return None
            continue
        count = min(_ROWS, rows.stop - rows.start)
        chosen = np.arange(count) * (rows.stop - rows.start) // count
        sample = (rows.start + chosen).tolist()
        stored = np.concatenate([read_or_zeros(weights.base, target.source, row, row + 1) for row in sample])
        deltas += [_mean_magnitude(kernels.Product(rows.a, rows.b[chosen]))] * count
        steps += [kernels.mean_step(stored, target.type)] * count
        energies += [float(np.square(quants.dequantize(stored, target.type), dtype=np.float64).mean())] * count
    if not deltas:
        return None
    weight = math.sqrt(np.mean(energies))
    return Steps(math.prod(target.shape), float(np.mean(deltas)), float(np.mean(steps)), weight)


def _mean_magnitude(delta: kernels.Product) -> float:
    """The mean of |delta|; infinite if it overflows. A product of this size is cheaper here than in BLAS's threads."""
    values = np.zeros((len(delta.b), delta.a.shape[1]), np.float32)
    stored = values.view(np.uint8)
    try:
        kernels.merge_rows(stored, _FLOAT, stored, _FLOAT, delta)
    except NonFiniteError:
        return math.inf
    return float(np.abs(values).mean())


def predictions(steps: Mapping[str, Steps]) -> dict[str, Any]:
    """Return the predictions for tensors together, by the name of their field in a report; none without tensors."""
    count = sum(each.weights for each in steps.values())
    if not count:
        return {}
    share = sum(each.delta_per_step * each.weights for each in steps.values()) / count
    energy = sum(each.predicted_noise**2 * each.weights for each in steps.values()) / count
    noise = sum(each.noise**2 * each.weights for each in steps.values())
    weight = sum(each.weight**2 * each.weights for each in steps.values())
    return {
        "delta_per_step": share,
        "predicted_noise": math.sqrt(energy),
        "relative_noise": math.sqrt(noise / weight) if weight else math.inf,
    }
