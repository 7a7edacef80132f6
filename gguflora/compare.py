"""How far apart two models answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def kl_divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean Kullback-Leibler divergence of ``other`` from ``reference``, in nats per position.

    Args:
        reference: logits (n_positions, n_vocab).
        other: logits of the same shape.
    """
    log_p, log_q = _log_softmax(reference), _log_softmax(other)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    log_softmax: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_softmax
