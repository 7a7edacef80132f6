"""The tensors of an output that differ from the base's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gguflora.files.gguf import TOKEN_EMBEDDING, GgufFile, Shape, TensorEntry
from gguflora.placement.place import PlacedDelta
from gguflora.quants.types import GgmlType

ScaledDelta = tuple[PlacedDelta, float]


@dataclass(frozen=True, slots=True)
class ChangedTensor:
    """A tensor of the output that differs from the base's.

    Attributes:
        name: name in the output.
        source: the base's tensor that it is computed from.
        shape: shape in the output; rows that the source does not have start as zeros.
        type: type in the output.
        deltas: the deltas to add, each with its scale.
    """

    name: str
    source: TensorEntry
    shape: Shape
    type: GgmlType
    deltas: Sequence[ScaledDelta]

    @property
    def n_rows(self) -> int:
        """Number of rows, over all leading dimensions."""
        return math.prod(self.shape[:-1])


def changed_tensor(file: GgufFile, name: str, items: Sequence[PlacedDelta]) -> ChangedTensor:
    """Return a tensor with deltas at scale 1. An output weight that the base does not have starts as the embedding."""
    source = file.tensors[name if name in file.tensors else TOKEN_EMBEDDING]
    return ChangedTensor(name, source, source.shape, source.type, [(item, 1.0) for item in items])
