"""The tensors of an output that are not just copied."""

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
    """A tensor of the output that is not just copied.

    Attributes:
        name: in the output.
        source: the base's tensor it is made from.
        shape: in the output; it may have more rows than its source, which begin as zeros.
        type: in the output.
        changes: what is added to it, each with its scale.
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
    """The target of changes at scale 1; an output weight that the base does not have is made from the embedding."""
    source = file.tensors[name if name in file.tensors else TOKEN_EMBEDDING]
    return ChangedTensor(name, source, source.shape, source.type, [(item, 1.0) for item in items])
