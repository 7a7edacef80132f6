"""PEANuT: the delta is a small neural network of the weight's columns (https://arxiv.org/abs/2410.01870).

Tensors of a module: ``peanut_A.weight`` (r, n_out), ``peanut_encoders.<i>.weight`` and ``peanut_decoders.<i>.weight``
(r, r) for i < ``depth``, ``peanut_B.weight`` (n_out, r). For each column w of the weight, h = f(A w). Each encoder E
computes h = f(E h), then each decoder D computes h = f(D h) + the input of the encoder at the mirrored position. The
delta of the column is ``scaling * B h`` (``peft.tuners.peanut``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import numpy as np

from gguflora.adapters.deltas import ShapeDependentDelta, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.errors import UnsupportedAdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices


def _sigmoid(x: Float64Array) -> Float64Array:
    result: Float64Array = 0.5 * (1 + np.tanh(0.5 * x))
    return result


def _erf(x: Float64Array) -> Float64Array:
    result: Float64Array = np.vectorize(math.erf, otypes=[np.float64])(x)
    return result


def _softplus(x: Float64Array) -> Float64Array:
    return np.logaddexp(0, x)


ACTIVATIONS: Final[dict[str, Callable[[Float64Array], Float64Array]]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky_relu": lambda x: np.where(x < 0, 0.01 * x, x),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))),
    "gelu_python": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))),
    "linear": lambda x: x,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "silu": lambda x: x * _sigmoid(x),
    "swish": lambda x: x * _sigmoid(x),
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "gelu_new": lambda x: x * _sigmoid(np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)),
    "gelu_pytorch_tanh": lambda x: x * _sigmoid(np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)),
}
"""Activation functions by the value of ``act_fn``, as in transformers' ``ACT2FN``."""


def read_peanut(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, ShapeDependentDelta]:
    """Read the delta of every adapted weight.

    Raises:
        UnsupportedAdapterError: for an activation function that gguflora does not implement.
    """
    name = config.fields.get("act_fn", "relu")
    if name not in ACTIVATIONS:
        raise UnsupportedAdapterError(f"{config.path}: act_fn is {name!r}; supported: {', '.join(ACTIVATIONS)}")
    depth, scaling = int(config.number("depth", 0)), config.number("scaling", 1.0)
    layers = [f"peanut_{side}.{index}" for side in ("encoders", "decoders") for index in range(depth)]
    deltas = {}
    for module, parts in by_module(config, tensors, ["peanut_A", "peanut_B", *layers]).items():
        a, b, *inner = take(config, module, parts, "peanut_A", "peanut_B", *layers)
        rank, n_out = expect(config, module, "peanut_A", a, (None, None)).shape
        expect(config, module, "peanut_B", b, (n_out, rank))
        for layer, matrix in zip(layers, inner, strict=True):
            expect(config, module, layer, matrix, (rank, rank))
        function = partial(_network, ACTIVATIONS[name], scaling, a, b, inner)
        deltas[f"{module}.weight"] = ShapeDependentDelta.formula((n_out, None), function, whole=True)
    return deltas


def _network(
    activation: Callable[[Float64Array], Float64Array],
    scaling: float,
    a: Array,
    b: Array,
    layers: list[Array],
    w: Float64Array,
    rows: Indices,
) -> Float64Array:
    h = activation(as_float64(a) @ w)
    depth, starts = len(layers) // 2, []
    for encoder in layers[:depth]:
        starts.append(h)
        h = activation(as_float64(encoder) @ h)
    for decoder, start in zip(layers[depth:], reversed(starts), strict=True):
        h = activation(as_float64(decoder) @ h) + start
    delta: Float64Array = scaling * (as_float64(b) @ h)
    return delta
