"""DELORA: rank-one terms of fixed strength (https://arxiv.org/abs/2503.18225; PEFT: tuners/delora/layer.py).

``W' = W + B diag(lambda / (r |A_k| |B^k|)) A diag(w_norm)``, with norms of at least 1e-4. Tensors of a module:
``delora_A`` (r, n_in), ``delora_B`` (n_out, r), ``delora_lambda`` (1) and ``delora_w_norm`` (n_in), the norms of the
base's columns at the start of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from gguflora.adapters.deltas import Delta, LowRank, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.files.safetensors import Array

_PARTS: Final = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")


def read_delora(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Delta]:
    """Read the delta of every adapted weight."""
    deltas: dict[str, Delta] = {}
    for module, parts in by_module(config, tensors, _PARTS).items():
        a, b, strength, column_norms = take(config, module, parts, *_PARTS)
        expect(config, module, "delora_A", a, (None, None))
        expect(config, module, "delora_B", b, (None, a.shape[0]))
        expect(config, module, "delora_lambda", strength, (1,))
        expect(config, module, "delora_w_norm", column_norms, (a.shape[1],))
        left, right = as_float64(b), as_float64(a)
        norms = np.maximum(np.linalg.norm(right, axis=1), 1e-4) * np.maximum(np.linalg.norm(left, axis=0), 1e-4)
        scaled = left * (float(as_float64(strength)[0]) / len(right) / norms)
        deltas[f"{module}.weight"] = LowRank(right * as_float64(column_norms), scaled, 1.0)
    return deltas
