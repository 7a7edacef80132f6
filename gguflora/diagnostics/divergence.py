"""KL divergence between the next-token distributions of two models."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def kl_divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the mean Kullback-Leibler divergence of ``other`` from ``reference``, in nats per position.

    Args:
        reference: logits (n_positions, n_vocab).
        other: logits of the same shape.
    """
    return float(kl_divergences(log_softmax(reference), log_softmax(other)).mean())


def kl_divergences(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the divergence at each position, given log-probabilities (n_positions, n_vocab)."""
    divergences: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return divergences


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the log-probabilities of logits (n_positions, n_vocab)."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    log_probabilities: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_probabilities
