"""Restrict an adapter of a multimodal model to its language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gguflora.adapters.adapter import Adapter
from gguflora.adapters.base_shapes import BaseShapes
from gguflora.adapters.deltas import Delta
from gguflora.architectures.names import is_foreign
from gguflora.errors import AdapterError, listed


def language_part(adapter: Adapter) -> Adapter:
    """Return an adapter without the deltas of vision towers, projectors and other parts beside the language model.

    A warning of the result names what was left out.

    Raises:
        AdapterError: if nothing remains.
    """
    left_out = [name for name in adapter.deltas if is_foreign(name)]
    if len(left_out) == len(adapter.deltas) and left_out and not adapter.from_base_shapes:
        raise AdapterError(
            f"{adapter.path}: all of its {len(left_out)} weights belong to other parts of a multimodal model "
            f"({listed(left_out, 3)}); nothing remains of it for the language model"
        )
    kept = {name: deltas for name, deltas in adapter.deltas.items() if name not in left_out}
    warnings = adapter.warnings
    if left_out:
        text = (
            f"took the language part: left out {len(left_out)} of {len(adapter.deltas)} weights, "
            f"{listed(left_out, 4)}; answers to images will differ from the trained model's"
        )
        warnings = (*warnings, text)
    from_shapes = adapter.from_base_shapes

    def language_deltas(base: BaseShapes) -> Mapping[str, Delta]:
        assert from_shapes is not None
        return {name: delta for name, delta in from_shapes(base).items() if not is_foreign(name)}

    return replace(
        adapter, deltas=kept, warnings=warnings, from_base_shapes=None if from_shapes is None else language_deltas
    )
