"""GRALORA: a LoRA for each of k x k blocks of a weight (https://arxiv.org/abs/2505.20355; PEFT: tuners/gralora).

Tensors of a module: ``gralora_A`` (k, n_in / k, r) and ``gralora_B`` (k, r, n_out / k). With q = r / k, the delta of
the block in block row i and block column j is ``(A[j][:, i q : (i + 1) q] B[i][j q : (j + 1) q])^T``. With ``hybrid_r``
= h > 0 an ordinary LoRA is added: ``gralora_A_general.weight`` (h, n_in) and ``gralora_B_general.weight`` (n_out, h).
The scaling is alpha / (r + h).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from gguflora.adapters.deltas import Delta, LowRank, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array

_BLOCKS: Final = ("gralora_A", "gralora_B")
_GENERAL: Final = ("gralora_A_general", "gralora_B_general")


def read_gralora(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Delta]:
    """The change of every adapted weight, of rank ``k r + h``."""
    hybrid = config.integer("hybrid_r", 0, minimum=0)
    deltas: dict[str, Delta] = {}
    for module, parts in by_module(config, tensors, (*_BLOCKS, *_GENERAL)).items():
        a, b, *general = take(config, module, parts, *_BLOCKS, *(_GENERAL if hybrid else ()))
        expect(config, module, "gralora_A", a, (None, None, None))
        blocks, _, rank = a.shape
        expect(config, module, "gralora_B", b, (blocks, rank, None))
        if not blocks or not rank or rank % blocks:
            raise AdapterError(f"{config.path.parent}: module {module!r}: {blocks} blocks cannot share rank {rank}")
        left, right = _spread(as_float64(a), as_float64(b))
        if general:
            expect(config, module, _GENERAL[0], general[0], (hybrid, right.shape[1]))
            expect(config, module, _GENERAL[1], general[1], (left.shape[0], hybrid))
            right = np.concatenate([right, as_float64(general[0])])
            left = np.concatenate([left, as_float64(general[1])], axis=1)
        deltas[f"{module}.weight"] = LowRank(right, left, config.number("alpha", 64) / (rank + hybrid))
    return deltas


def _spread(a: Float64Array, b: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return factors of the whole weight; term (i, j, t) is number t of the block in block row i, block column j."""
    k, width, rank = a.shape
    height, q = b.shape[2], rank // k
    left, right = np.zeros((k, height, k, k, q)), np.zeros((k, k, q, k, width))
    for i in range(k):
        for j in range(k):
            left[i, :, i, j] = b[i, j * q : (j + 1) * q].T
            right[i, j, :, j] = a[j, :, i * q : (i + 1) * q].T
    return left.reshape(k * height, k * rank), right.reshape(k * rank, k * width)
