"""PiSSA and OLoRA: LoRA that starts from a part of the base's weight, and is trained on the rest of it.

An adapter saved without ``path_initial_model_for_weight_conversion`` holds the trained factors only, so the start is
rebuilt from the base: ``W' = W - start + factor * B A`` (``peft.tuners.lora.layer``). The start is the sum of the r
largest singular triplets of W (PiSSA, https://arxiv.org/abs/2404.02948), or ``factor * Q R`` of the first r columns and
rows of its QR decomposition (OLoRA, https://arxiv.org/abs/2406.01775).
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


def without_start(change: LowRank, start: str) -> FunctionDelta:
    """The change of a weight that was trained without its start.

    Args:
        change: ``factor * B A``.
        start: one of `STARTS`.
    """
    function = _without_largest if start == "pissa" else _without_first
    return FunctionDelta(change.shape, partial(function, change), whole=True, caution=CAUTION)


def _without_largest(change: LowRank, w: Float64Array, rows: Indices) -> Float64Array:
    return change.delta(w, rows) - largest(w, change.rank)


def _without_first(change: LowRank, w: Float64Array, rows: Indices) -> Float64Array:
    q, r = np.linalg.qr(w)
    start: Float64Array = change.factor * (q[:, : change.rank] @ r[: change.rank])
    return change.delta(w, rows) - start
