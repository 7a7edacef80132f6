"""DoRA: LoRA with a learned norm for each row of the weight (https://arxiv.org/abs/2402.09353).

In addition to LoRA's factors a module has ``lora_magnitude_vector`` m: (n_out,) for a linear layer, (width,) for an
embedding. With ``V = W + scaling * B A``, ``W' = m / |V| * V``, where |V| holds the L2 norms of V's rows, for an
embedding those of its columns (``peft.tuners.lora.variants``).

At scale s the weight is ``W + s (W' - W)``. PEFT's ``set_scale`` changes ``scaling`` in V instead, which does not
change the magnitudes and does not give W at scale 0.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from gguflora.adapters.deltas import Delta, FunctionDelta, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import expect
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices


def with_magnitude(
    config: PeftConfig, module: str, delta: Delta, magnitude: Array, *, embedding: bool = False
) -> FunctionDelta:
    """Return the delta of a weight with DoRA.

    Args:
        config: configuration of the adapter, for messages.
        module: name of the module, for messages.
        delta: ``scaling * B A``; for PiSSA and OLoRA minus the initial factors.
        magnitude: the magnitudes, (n_out,), or (width,) for an embedding (rows, width).
        embedding: whether the module is an embedding.
    """
    expect(config, module, "lora_magnitude_vector", magnitude, (delta.shape[int(embedding)],))
    function = _scaled_columns if embedding else _scaled_rows
    caution = delta.caution if isinstance(delta, FunctionDelta) else ""
    return FunctionDelta(delta.shape, partial(function, delta, magnitude), embedding or delta.whole, caution)


def _scaled_rows(delta: Delta, magnitude: Array, w: Float64Array, rows: Indices) -> Float64Array:
    v = w + delta.compute(w, rows)
    factors = as_float64(magnitude[rows]) / np.linalg.norm(v, axis=1)
    result: Float64Array = factors[:, None] * v - w
    return result


def _scaled_columns(delta: Delta, magnitude: Array, w: Float64Array, rows: Indices) -> Float64Array:
    v = w + delta.compute(w, rows)
    result: Float64Array = as_float64(magnitude) / np.linalg.norm(v, axis=0) * v - w
    return result
