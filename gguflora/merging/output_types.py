"""Which quant type each merged tensor is written in."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gguflora.files.gguf import TensorEntry
from gguflora.quants.types import GgmlType, type_named


@dataclass(frozen=True, slots=True)
class OutputTypes:
    """In which types changed tensors are written.

    Attributes:
        general: for all matrices; None keeps each tensor's own.
        patterns: for tensors whose name matches, a glob of the whole name or a regular expression found in it; the
            first that matches counts.
    """

    general: GgmlType | None = None
    patterns: tuple[tuple[str, GgmlType], ...] = ()

    @classmethod
    def named(cls, outtype: str, patterns: Mapping[str, str]) -> OutputTypes:
        """From the names that a user gives.

        Raises:
            QuantizationError: for an unknown type.
        """
        general = None if outtype == "keep" else type_named(outtype)
        return cls(general, tuple((pattern, type_named(name)) for pattern, name in patterns.items()))

    def type_of(self, name: str, source: TensorEntry, *, only_floats: bool) -> GgmlType:
        """The type of a changed tensor; what a quantized file holds in F32, it holds so for a reason."""
        for pattern, kind in self.patterns:
            if _matches(pattern, name):
                return kind
        stays = len(source.shape) < 2 or (source.type.name == "F32" and not only_floats) or name.endswith(_PRECISE)
        return source.type if self.general is None or stays else self.general

    def unused(self, names: Sequence[str]) -> list[str]:
        """Patterns that match none of the names."""
        return [pattern for pattern, _ in self.patterns if not any(_matches(pattern, name) for name in names)]


_PRECISE: Final = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight")


def _matches(pattern: str, name: str) -> bool:
    if fnmatch.fnmatchcase(name, pattern):
        return True
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False
