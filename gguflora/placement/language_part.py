"""Restrict an adapter of a multimodal model to its language model, or to the other parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    return _restricted(
        adapter,
        lambda weight: not is_foreign(weight),
        "belong to other parts of a multimodal model ({}); nothing remains of it for the language model",
        "took the language part: left out {}; answers to images will differ from the trained model's",
    )


def other_part(adapter: Adapter) -> Adapter:
    """Return an adapter with only the deltas that `language_part` leaves out, for an mmproj file.

    A warning of the result names what was left out.

    Raises:
        AdapterError: if nothing remains.
    """
    return _restricted(
        adapter,
        is_foreign,
        "belong to the language model ({}); nothing remains of it for an mmproj file",
        "took the vision part: left out {}; the language part (--text-only) belongs into the model's other file",
    )


def _restricted(adapter: Adapter, belongs: Callable[[str], bool], nothing: str, partly: str) -> Adapter:
    left_out = [name for name in adapter.deltas if not belongs(name)]
    if len(left_out) == len(adapter.deltas) and left_out and not adapter.from_base_shapes:
        raise AdapterError(f"{adapter.path}: all of its {len(left_out)} weights " + nothing.format(listed(left_out, 3)))
    kept = {name: deltas for name, deltas in adapter.deltas.items() if name not in left_out}
    warnings = adapter.warnings
    if left_out:
        text = f"{len(left_out)} of {len(adapter.deltas)} weights, {listed(left_out, 4)}"
        warnings = (*warnings, partly.format(text))
    from_shapes = adapter.from_base_shapes

    def part_of_deltas(base: BaseShapes) -> Mapping[str, Delta]:
        assert from_shapes is not None
        return {name: delta for name, delta in from_shapes(base).items() if belongs(name)}

    return replace(
        adapter, deltas=kept, warnings=warnings, from_base_shapes=None if from_shapes is None else part_of_deltas
    )
