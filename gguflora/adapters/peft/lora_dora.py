"""DoRA: LoRA with the length of each row of the weight learned apart (https://arxiv.org/abs/2402.09353).

Besides LoRA's factors a module has ``lora_magnitude_vector`` m, (n_out,) of a linear layer, (width,) of an embedding.
With ``V = W + scaling * B A`` it is ``W' = m / |V| * V``, where |V| holds the L2 norms of V's rows; of an embedding,
whose rows are tokens, those of its columns (``peft.tuners.lora.variants``).

At scale s the weight is ``W + s (W' - W)``. PEFT's ``set_scale`` scales ``scaling`` within V instead, which leaves the
magnitudes as they are and does not come back to W at scale 0.
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
    """The change of a weight by its low-rank change and its magnitudes.

    Args:
        config: of the adapter, for messages.
        module: the same.
        delta: ``scaling * B A``, for PiSSA and OLoRA without their start.
        magnitude: (n_out,), or (n_in,) of an embedding's weight (rows, width).
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
