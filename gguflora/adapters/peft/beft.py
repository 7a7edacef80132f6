"""BEFT: learned numbers added to biases (https://arxiv.org/abs/2509.15974; ``peft.tuners.beft``).

Tensor of a module: ``beft_bias`` (1, n_out): ``b' = b + beft_bias``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from gguflora.adapters.deltas import FunctionDelta, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices


def read_beft(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, FunctionDelta]:
    """Read the delta of every adapted bias; the base must have these biases."""
    deltas = {}
    for module, parts in by_module(config, tensors, ["beft_bias"]).items():
        (bias,) = take(config, module, parts, "beft_bias")
        expect(config, module, "beft_bias", bias, (1, None))
        deltas[f"{module}.bias"] = FunctionDelta((bias.shape[1], 1), partial(_add, bias.T))
    return deltas


def _add(bias: Array, w: Float64Array, rows: Indices) -> Float64Array:
    return as_float64(bias[rows])
