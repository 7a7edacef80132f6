"""Recognize weights saved with an adapter that are only copies of the base's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from gguflora.adapters.deltas import Delta, Replace, as_float64, trained_rows
from gguflora.files.gguf import TOKEN_EMBEDDING, GgufFile, TensorEntry
from gguflora.placement.base_weights import read_values
from gguflora.placement.place import PlacedDelta


def without_copies(base: GgufFile, placed: Mapping[str, Sequence[PlacedDelta]]) -> dict[str, list[PlacedDelta]]:
    """Return the deltas without those that only replace a weight by a copy of it (PEFT: save_embedding_layers).

    A copy may differ from the base's weight by the error of quantizing the base.
    """
    kept = {}
    for name, items in placed.items():
        tensor = base.tensors.get(name) or base.tensors[TOKEN_EMBEDDING]
        is_vector = name in base.tensors and len(tensor.shape) == 1
        own = [item for item in items if not (is_vector and _repeats_vector(base, tensor, item))]
        kept_items = (without_copy(item) if _is_copy(base, tensor, item.delta) else item for item in own)
        changed = [item for item in kept_items if item is not None]
        if changed:
            kept[name] = changed
    return kept


def _repeats_vector(base: GgufFile, tensor: TensorEntry, item: PlacedDelta) -> bool:
    """Whether a delta replaces a norm or bias by the same values, up to the last bit of a float32."""
    if not isinstance(item.delta, Replace) or not item.by_rows or item.shape != (tensor.n_in, 1):
        return False
    stored = read_values(base, tensor, 0, 1)
    return bool((np.abs(item.compute(stored, 0)) <= 2.0**-23 * np.abs(stored)).all())


def without_copy(item: PlacedDelta) -> PlacedDelta | None:
    """Return what a delta that is a copy of the base's weight changes nevertheless: its trained rows; None if none."""
    assert isinstance(item.delta, Replace)
    return replace(item, delta=trained_rows(item.delta)) if item.delta.trained else None


def _is_copy(base: GgufFile, tensor: TensorEntry, delta: Delta) -> bool:
    if not isinstance(delta, Replace) or not delta.is_base_copy or delta.shape[0] > tensor.n_rows:
        return False
    difference = norm = 0.0
    step = max(1, (1 << 20) // tensor.n_in)
    for start in range(0, delta.shape[0], step):
        values = as_float64(delta.values[start : start + step])
        stored = read_values(base, tensor, start, start + len(values))
        values, stored = (
            np.delete(rows, [row - start for row in delta.trained if start <= row < start + len(rows)], 0)
            for rows in (values, stored)
        )
        difference += float(((values - stored) ** 2).sum())
        norm += float((values**2).sum())
    return difference <= _COPY_TOLERANCE.get(tensor.type.name, _QUANTIZED_TOLERANCE) ** 2 * norm


# maximum relative error of rounding to a type; 2-bit types lose about a third
_COPY_TOLERANCE: Final = {"F32": 1e-2, "F16": 1e-2, "BF16": 1e-2, "Q8_0": 2e-2}


_QUANTIZED_TOLERANCE: Final = 0.4
