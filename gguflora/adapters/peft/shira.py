"""SHiRA: numbers added to some of the weight's elements (https://arxiv.org/abs/2406.13175; ``peft.tuners.shira``).

Tensors of a module: ``shira_indices`` (2, n), rows and columns, and ``shira_weight`` (n,), the numbers to add there.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gguflora.adapters.deltas import Delta, ShapeDependentDelta
from gguflora.adapters.numerics.sparse import add_sparse
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.errors import AdapterError, MismatchError
from gguflora.files.safetensors import Array


def read_shira(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, ShapeDependentDelta]:
    """Read the delta of every adapted weight."""
    deltas = {}
    for module, parts in by_module(config, tensors, ["shira_indices", "shira_weight"]).items():
        indices, values = take(config, module, parts, "shira_indices", "shira_weight")
        expect(config, module, "shira_weight", values, (None,))
        if indices.shape != (2, len(values)) or indices.dtype.kind not in "iu":
            raise AdapterError(
                f"{config.path.parent}: module {module!r}: shira_indices has shape {indices.shape} and type "
                f"{indices.dtype}, expected whole numbers of shape (2, {len(values)})"
            )
        deltas[f"{module}.weight"] = _elements(config, module, indices, values)
    return deltas


def _elements(config: PeftConfig, module: str, indices: Array, values: Array) -> ShapeDependentDelta:
    def build(shape: tuple[int, int]) -> Delta:
        expected = int(config.number("r", 32)) * sum(shape)
        if len(values) != expected:
            raise MismatchError(
                f"{config.path.parent}: module {module!r}: shira_weight has {len(values)} numbers, expected {expected} "
                f"for a weight of shape {shape}; is it the right base?"
            )
        rows, columns = indices.astype(np.int64)
        return add_sparse(f"{config.path.parent}: module {module!r}", shape, rows, columns, values)

    return ShapeDependentDelta((None, None), build)
