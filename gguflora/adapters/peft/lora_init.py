"""PiSSA and OLoRA: LoRA that starts from a part of the base's weight, and is trained on the rest of it.

An adapter saved without ``path_initial_model_for_weight_conversion`` holds the trained factors only, so the start is
rebuilt from the base: ``W' = W - start + scaling * B A`` (``peft.tuners.lora.layer``). The start is the sum of the r
largest singular triplets of W (PiSSA, https://arxiv.org/abs/2404.02948), or ``scaling * Q R`` of the first r columns
and rows of its QR decomposition (OLoRA, https://arxiv.org/abs/2406.01775).
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from gguflora.adapters.deltas import FunctionDelta, LowRank
from gguflora.adapters.numerics.spectrum import CAUTION, largest
from gguflora.quants.arrays import Float64Array, Indices

STARTS: Final = ("pissa", "olora")
"""``init_lora_weights`` whose start is a function of the base's weight alone (``pissa_niter_N`` is random, too)."""


def without_start(delta: LowRank, start: str) -> FunctionDelta:
    """The change of a weight that was trained without its start.

    Args:
        delta: ``scaling * B A``.
        start: one of `STARTS`.
    """
    function = _without_largest if start == "pissa" else _without_first
    return FunctionDelta(delta.shape, partial(function, delta), whole=True, caution=CAUTION)


def _without_largest(delta: LowRank, w: Float64Array, rows: Indices) -> Float64Array:
    return delta.compute(w, rows) - largest(w, delta.rank)


def _without_first(delta: LowRank, w: Float64Array, rows: Indices) -> Float64Array:
    q, r = np.linalg.qr(w)
    start: Float64Array = delta.scaling * (q[:, : delta.rank] @ r[: delta.rank])
    return delta.compute(w, rows) - start
