"""Adapter sets by name: ``legal@0.5+tone@0.3``."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

import numpy as np

from gguflora.errors import AdapterNameError, RequestError

AdapterSet: TypeAlias = tuple[tuple[str, float], ...]
"""Names and scales, sorted by name; nothing at scale 0. Equal sets are equal."""

Identity: TypeAlias = frozenset[tuple[str, int, float]]
"""(SHA-256 of the file, generation, scale) of each adapter of a set: what its KV cells depend on."""

BASE: Final = "base"
"""The empty set's name."""

_NAME: Final = re.compile(r"[^\s@+=,]+")


def check_name(name: str) -> None:
    """Raise unless ``name`` can be that of an adapter.

    Raises:
        AdapterNameError: if it cannot.
    """
    if not isinstance(name, str) or name == BASE or not _NAME.fullmatch(name):
        raise AdapterNameError(
            f"{name!r:.80} cannot name an adapter: expected text without spaces and @ + = , that is not {BASE!r}"
        )


def parse_set(text: str) -> list[tuple[str, float | None]]:
    """Names and scales of ``legal@0.5+tone``; None for a scale left out.

    Raises:
        AdapterNameError: for a malformed name.
        RequestError: for a scale that is no number.
    """
    if text == BASE:
        return []
    pairs: list[tuple[str, float | None]] = []
    for part in text.split("+"):
        name, at, scale = part.strip().partition("@")
        check_name(name)
        try:
            pairs.append((name, float(scale) if at else None))
        except ValueError:
            raise RequestError(f"the scale of {name!r} is {scale!r}, expected a number") from None
    return pairs


def canonical_set(pairs: Iterable[tuple[str, float | None]], default_scales: Mapping[str, float]) -> AdapterSet:
    """The set of these names at these scales (None: the adapter's own), each rounded to a 32-bit float.

    Raises:
        AdapterNameError: for a name that is not in ``default_scales``.
        RequestError: for a name given twice, or a scale that is no finite number.
    """
    scales: dict[str, float] = {}
    for name, scale in pairs:
        if name not in default_scales:
            known = ", ".join(map(repr, default_scales)) or "none"
            raise AdapterNameError(f"no adapter named {name!r:.80} is loaded; loaded: {known}")
        if name in scales:
            raise RequestError(f"the adapter {name!r} is given twice")
        scales[name] = checked_scale(name, default_scales[name] if scale is None else scale)
    return tuple(sorted((name, scale) for name, scale in scales.items() if scale != 0))


def checked_scale(name: str, scale: float) -> float:
    """``scale`` as the 32-bit float that llama.cpp makes of it.

    Raises:
        RequestError: if it is no finite number.
    """
    if isinstance(scale, numbers.Real) and not isinstance(scale, bool):
        with np.errstate(over="ignore"):
            rounded = float(np.float32(float(scale))) if abs(scale) < 1e300 else math.inf
        if math.isfinite(rounded):
            return rounded
    raise RequestError(f"the scale of {name!r} is {scale!r:.80}, expected a finite number that a 32-bit float can hold")


def describe_set(adapters: AdapterSet) -> str:
    """The text that `parse_set` reads as ``adapters``."""
    return "+".join(f"{name}@{scale:g}" for name, scale in adapters) or BASE
