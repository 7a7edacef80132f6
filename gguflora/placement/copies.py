"""Recognize weights saved with an adapter that are only copies of the base's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from gguflora.adapters.deltas import Delta, Replace, as_float64, trained_rows
from gguflora.errors import listed
from gguflora.files.gguf import TOKEN_EMBEDDING, GgufFile, TensorEntry
from gguflora.files.gguf_tensors import check_readable
from gguflora.placement.base_weights import read_values
from gguflora.placement.place import PlacedDelta
from gguflora.quants.arrays import Float64Array
from gguflora.quants.kernels import dequantize_rows, quantize_rows
from gguflora.quants.types import TYPES, GgmlType


def without_copies(base: GgufFile, placed: Mapping[str, Sequence[PlacedDelta]]) -> dict[str, list[PlacedDelta]]:
    """Return the deltas without those that only replace a weight by a copy of it (PEFT: save_embedding_layers).

    Each row of a copy may differ from the base's row by the error of quantizing it; a weight with any other row counts.
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


def describe_copies(
    placed: Mapping[str, Sequence[PlacedDelta]], kept: Mapping[str, Sequence[PlacedDelta]]
) -> list[str]:
    """Return a warning that names the weights which `without_copies` has dropped, or an empty list."""
    dropped = {
        item.weight for name, items in placed.items() for item in items if not _is_kept(item, kept.get(name, ()))
    }
    return [] if not dropped else [f"left out saved copies of the base's weights: {listed(sorted(dropped), 4)}"]


def _is_kept(item: PlacedDelta, kept: Sequence[PlacedDelta]) -> bool:
    return any(other.delta is item.delta and other.weight == item.weight for other in kept)


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
    check_readable(base.path, [tensor])
    step = max(1, (1 << 20) // tensor.n_in)
    n_same = n_other = 0
    for start in range(0, delta.shape[0], step):
        values = as_float64(delta.values[start : start + step])
        stored = read_values(base, tensor, start, start + len(values))
        values, stored = (
            np.delete(rows, [row - start for row in delta.trained if start <= row < start + len(rows)], 0)
            for rows in (values, stored)
        )
        rounded = _rounded(values, tensor.type)
        away = _norms(values - stored)
        if (away > _explained(values, rounded, _SLACK)).any():
            return False
        if rounded is not None:
            n_same += int(np.count_nonzero((rounded == stored).all(axis=1)))
            n_other += int(np.count_nonzero(away > _explained(values, rounded, _SAME_SEARCH)))
    return not (n_other and n_same > _REPRODUCED * (n_same + n_other))


def _norms(rows: Float64Array) -> Float64Array:
    return np.asarray(np.sqrt((rows**2).sum(axis=1)))


def _rounded(values: Float64Array, kind: GgmlType) -> Float64Array | None:
    """Return the values that the base's type holds for some rows, or None if rounding needs an importance matrix."""
    if kind.id not in TYPES or kind.needs_imatrix:
        return None
    rows = np.ascontiguousarray(values, np.float32)
    packed = np.empty((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
    quantize_rows(rows, kind, packed)
    back = np.empty_like(rows)
    dequantize_rows(packed, kind, back)
    return back.astype(np.float64)


def _explained(values: Float64Array, rounded: Float64Array | None, slack: float) -> Float64Array:
    """Return for each row the largest difference from the base's row that rounding can explain.

    That is the error of rounding the row itself to the base's type, times ``slack``, and the error of the BF16 in which
    adapters are saved.
    """
    norms = _norms(values)
    return _UNMEASURED * norms if rounded is None else slack * _norms(rounded - values) + _BF16 * norms


_SLACK: Final = 2.0
"""For a base whose importance matrix is not known, which trades errors between the columns."""
_SAME_SEARCH: Final = 1.04
"""For a base rounded as here, whose scales may still differ a little because its weights came from another float."""
_REPRODUCED: Final = 0.25
"""Share of rows, among the same and the changed ones, above which a base is rounded without an importance matrix.

The saved rows, rounded here, are then the base's rows bit for bit, so a row that is not was changed, however little.
"""
_BF16: Final = 2.0**-7
_UNMEASURED: Final = 0.4
"""Relative error of a row of a type below 2 bits, which cannot be measured without its importance matrix."""
