"""What an adapter does to one weight: the vocabulary that every PEFT method is read into.

A weight is (n_out, n_in), as ``torch.nn.Linear`` and numpy's view of a GGUF tensor have it. Arrays keep the dtype
they have on disk (bf16 as uint16 bits, see `gguflora.files.safetensors`) until numbers are needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gguflora.files.safetensors import Array, as_float32


@dataclass(frozen=True, slots=True)
class LowRank:
    """``W + factor * b @ a`` (LoRA: https://arxiv.org/abs/2106.09685).

    Attributes:
        a: (rank, n_in).
        b: (n_out, rank).
        factor: alpha / rank, or what the method puts in its place.
    """

    a: Array
    b: Array
    factor: float

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight it changes."""
        return self.b.shape[0], self.a.shape[1]

    def with_rows(self, order: NDArray[np.intp]) -> LowRank:
        """The change of a weight whose row ``i`` is this weight's row ``order[i]``."""
        return replace(self, b=self.b[order])

    def transposed(self) -> LowRank:
        """The change of the transposed weight."""
        return replace(self, a=self.b.T, b=self.a.T)


def sum_factors(changes: Iterable[tuple[LowRank, float]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One pair of float32 factors for a sum of low-rank changes, each times its scale.

    Returns:
        a (sum of ranks, n_in) and b (n_out, sum of ranks) with ``b @ a = sum(scale * factor * b_i @ a_i)``.
    """
    pairs = list(changes)
    a = np.concatenate([as_float32(change.a) for change, _ in pairs], axis=0)
    b = np.concatenate([fold(change, scale) for change, scale in pairs], axis=1)
    return np.ascontiguousarray(a), np.ascontiguousarray(b)


def fold(change: LowRank, scale: float = 1.0) -> NDArray[np.float32]:
    """``scale * factor * b`` in float32, multiplied in float64 and rounded once."""
    return (as_float32(change.b).astype(np.float64) * (scale * change.factor)).astype(np.float32)
