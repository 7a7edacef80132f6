"""VBLORA: LoRA whose factors are mixed from a bank of vectors (https://arxiv.org/abs/2405.15179; PEFT: tuners/vblora).

All modules share ``vblora_vector_bank`` (N, v). Each run of v numbers of A and B is the sum of the ``topk`` vectors
with the largest logits, weighted with the softmax of these logits. A module has ``vblora_logits_A`` (r, n_in / v, N)
and ``vblora_logits_B`` (n_out / v, r, N). With ``save_only_topk_weights`` it has ``..._topk_indices`` (.., k) and
``..._topk_weights`` (.., k - 1) instead, where the last weight is 1 minus the sum of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from gguflora.adapters.deltas import Delta, LowRank, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import (
    Parts,
    by_module,
    split_shared,
    take,
)
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array

_BANK: Final = "vblora_vector_bank"
_LOGITS: Final = ("vblora_logits_A", "vblora_logits_B")


def read_vblora(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Delta]:
    """Read the delta of every adapted weight."""
    shared, own = split_shared(config, tensors, [_BANK])
    (bank,) = take(config, "base_model", shared, _BANK)
    if bank.ndim != 2:
        raise AdapterError(f"{config.path.parent}: {_BANK} has shape {bank.shape}, expected a matrix")
    parts_of_module = [f"{name}{suffix}" for name in _LOGITS for suffix in ("", "_topk_indices", "_topk_weights")]
    deltas: dict[str, Delta] = {}
    for module, parts in by_module(config, own, parts_of_module).items():
        a, b = (_mix(config, module, parts, name, as_float64(bank)) for name in _LOGITS)
        rank = a.shape[0]
        if b.shape[1] != rank:
            raise AdapterError(f"{config.path.parent}: module {module!r}: A and B do not share a rank")
        # (n_out / v, r, v) to (n_out, r)
        deltas[f"{module}.weight"] = LowRank(a.reshape(rank, -1), b.swapaxes(1, 2).reshape(-1, rank), 1.0)
    return deltas


def _mix(config: PeftConfig, module: str, parts: Parts, name: str, bank: Float64Array) -> Float64Array:
    """Return weighted sums of the bank's vectors, (.., .., v)."""
    where = f"{config.path.parent}: module {module!r}: {name}"
    if name in parts:
        indices, weights = _choose(parts[name], config.integer("topk", 2, minimum=1))
    elif f"{name}_topk_indices" in parts and f"{name}_topk_weights" in parts:
        indices, weights = parts[f"{name}_topk_indices"].astype(np.intp), as_float64(parts[f"{name}_topk_weights"])
        weights = np.concatenate([weights, 1 - weights.sum(axis=-1, keepdims=True)], axis=-1)
    else:
        raise AdapterError(f"{where} is missing; the adapter is incomplete")
    if indices.ndim != 3 or indices.shape != weights.shape or indices.min() < 0 or indices.max() >= len(bank):
        raise AdapterError(
            f"{where}: indices {indices.shape} and weights {weights.shape} do not fit {len(bank)} vectors"
        )
    mixed = np.zeros((*indices.shape[:2], bank.shape[1]))
    for choice in range(indices.shape[2]):
        mixed += weights[..., choice, None] * bank[indices[..., choice]]
    return mixed


def _choose(logits: Array, topk: int) -> tuple[Array, Float64Array]:
    values = as_float64(logits)
    indices = np.argpartition(-values, min(topk, values.shape[-1]) - 1, axis=-1)[..., :topk]
    chosen = np.take_along_axis(values, indices, axis=-1)
    weights = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
    return indices, weights / weights.sum(axis=-1, keepdims=True)
