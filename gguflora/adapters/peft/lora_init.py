"""PiSSA and OLoRA: LoRA whose initial factors are a part of the base's weight, which is subtracted from it.

An adapter saved without ``path_initial_model_for_weight_conversion`` holds only the trained factors, so the initial
part is recomputed from the base: ``W' = W - initial + scaling * B A`` (``peft.tuners.lora.layer``). It is the sum of
the r largest singular triplets of W (PiSSA, https://arxiv.org/abs/2404.02948), or ``scaling * Q R`` with the first r
columns and rows of W's QR decomposition (OLoRA, https://arxiv.org/abs/2406.01775).
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from gguflora.adapters.deltas import FunctionDelta, LowRank
from gguflora.adapters.numerics.spectrum import CAUTION, largest
from gguflora.quants.arrays import Float64Array, Indices

INITIALIZATIONS: Final = ("pissa", "olora")
"""Values of ``init_lora_weights`` that depend only on the base's weight; ``pissa_niter_N`` is random as well."""


def subtract_initial(delta: LowRank, initialization: str) -> FunctionDelta:
    """Return a low-rank delta minus the initial part of the weight.

    Args:
        delta: ``scaling * B A``.
        initialization: one of `INITIALIZATIONS`.
    """
    function = _without_largest if initialization == "pissa" else _without_first
    return FunctionDelta(delta.shape, partial(function, delta), whole=True, caution=CAUTION)


def _without_largest(delta: LowRank, w: Float64Array, rows: Indices) -> Float64Array:
    return delta.compute(w, rows) - largest(w, delta.rank)


def _without_first(delta: LowRank, w: Float64Array, rows: Indices) -> Float64Array:
    q, r = np.linalg.qr(w)
    initial: Float64Array = delta.scaling * (q[:, : delta.rank] @ r[: delta.rank])
    return delta.compute(w, rows) - initial
