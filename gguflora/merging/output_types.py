"""Choose the quant type of each merged tensor."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gguflora.files.gguf import TensorEntry
from gguflora.merging.mixture import FALLBACKS
from gguflora.quants.types import GgmlType, type_named


@dataclass(frozen=True, slots=True)
class OutputTypes:
    """The quant types of changed tensors.

    Attributes:
        general: type of all matrices; None keeps each tensor's own type.
        patterns: types by name pattern; a pattern is a glob for the whole name, or a regular expression that is
            searched in it. The first match counts.
    """

    general: GgmlType | None = None
    patterns: tuple[tuple[str, GgmlType], ...] = ()

    @classmethod
    def from_names(cls, outtype: str, patterns: Mapping[str, str]) -> OutputTypes:
        """Look up the types that a user named.

        Raises:
            QuantizationError: if a type is unknown.
        """
        general = None if outtype == "keep" else type_named(outtype)
        return cls(general, tuple((pattern, type_named(name)) for pattern, name in patterns.items()))

    def type_of(self, name: str, source: TensorEntry, *, only_floats: bool) -> GgmlType:
        """Return the output type of a changed tensor.

        ``outtype`` does not apply to vectors, to `_PRECISE` tensors, or to F32 tensors of a quantized file, which
        llama.cpp keeps in F32 on purpose.
        """
        for pattern, kind in self.patterns:
            if _matches(pattern, name):
                return kind
        is_kept = len(source.shape) < 2 or (source.type.name == "F32" and not only_floats) or name.endswith(_PRECISE)
        return source.type if self.general is None or is_kept else self.general

    def fitting_type_of(self, name: str, source: TensorEntry, *, only_floats: bool) -> tuple[GgmlType, GgmlType | None]:
        """Return the output type of a changed tensor, and the type it replaces if rows are not whole blocks of that.

        The replacements are those of llama-quantize; a type that a pattern names is never replaced.
        """
        kind = self.type_of(name, source, only_floats=only_floats)
        named = any(_matches(pattern, name) for pattern, _ in self.patterns)
        has_fallback = kind.name in FALLBACKS or kind.block_weights <= 32
        if named or kind is not self.general or source.n_in % kind.block_weights == 0 or not has_fallback:
            return kind, None
        fallback = type_named(FALLBACKS.get(kind.name, kind.name))
        return (fallback if source.n_in % fallback.block_weights == 0 else type_named("F16")), kind

    def unused_patterns(self, names: Sequence[str]) -> list[str]:
        """Return the patterns that match none of the names."""
        return [pattern for pattern, _ in self.patterns if not any(_matches(pattern, name) for name in names)]


_PRECISE: Final = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight")


def _matches(pattern: str, name: str) -> bool:
    if fnmatch.fnmatchcase(name, pattern):
        return True
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False
