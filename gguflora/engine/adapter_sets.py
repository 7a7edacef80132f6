"""Names of adapter sets, such as ``legal@0.5+tone@0.3``."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Final, TypeAlias

import numpy as np

from gguflora.errors import AdapterNameError, RequestError

AdapterSet: TypeAlias = tuple[tuple[str, float], ...]
"""Names and scales, sorted by name, without scales of 0. Equal sets are equal tuples."""

Identity: TypeAlias = frozenset[tuple[str, int, float]]
"""(SHA-256 of the file, load id, scale) of each adapter of a set: KV cells of sets with equal identities are equal."""

BASE: Final = "base"
"""The name of the empty set."""

_MAX_LISTED: Final = 20
_NAME: Final = re.compile(r"[^\s@+=,]+")


def check_name(name: str) -> None:
    """Check that ``name`` is a valid name of an adapter.

    Raises:
        AdapterNameError: if it is not.
    """
    if not isinstance(name, str) or name == BASE or not _NAME.fullmatch(name):
        raise AdapterNameError(
            f"{name!r:.80} cannot name an adapter: expected text without spaces and @ + = , other than {BASE!r}"
        )


def parse_set(text: str) -> list[tuple[str, float | None]]:
    """Read names and scales from text such as ``legal@0.5+tone``.

    Returns:
        (name, scale) pairs; the scale is None where the text gives none.

    Raises:
        AdapterNameError: if a name is malformed.
        RequestError: if a scale is not a number.
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
    """Return the set of these adapters, with each scale rounded to a 32-bit float.

    Args:
        pairs: names and scales; None stands for the adapter's default scale.
        default_scales: default scale of each loaded adapter, by name.

    Raises:
        AdapterNameError: if a name is not in ``default_scales``.
        RequestError: if a name is given twice, or a scale is not a finite number.
    """
    scales: dict[str, float] = {}
    for name, scale in pairs:
        if name not in default_scales:
            known = ", ".join(map(repr, islice(default_scales, _MAX_LISTED))) or "none"
            known += f" and {len(default_scales) - _MAX_LISTED} more" if len(default_scales) > _MAX_LISTED else ""
            raise AdapterNameError(f"no adapter named {name!r:.80} is loaded; loaded: {known}")
        if name in scales:
            raise RequestError(f"the adapter {name!r} is given twice")
        scales[name] = checked_scale(name, default_scales[name] if scale is None else scale)
    return tuple(sorted((name, scale) for name, scale in scales.items() if scale != 0))


def checked_scale(name: str, scale: float) -> float:
    """Round a scale to a 32-bit float, as llama.cpp does.

    Raises:
        RequestError: if it is not a finite number.
    """
    if isinstance(scale, numbers.Real) and not isinstance(scale, bool):
        with np.errstate(over="ignore"):
            rounded = float(np.float32(float(scale))) if abs(scale) < 1e300 else math.inf
        if math.isfinite(rounded):
            return rounded
    raise RequestError(f"the scale of {name!r} is {scale!r:.80}, expected a finite number that a 32-bit float can hold")


def describe_set(adapters: AdapterSet) -> str:
    """Return the text of an adapter set; `parse_set` reads it back."""
    return "+".join(f"{name}@{_shortest(scale)}" for name, scale in adapters) or BASE


def _shortest(scale: float) -> str:
    """Return the shortest text that a 32-bit float is read from."""
    return f"{scale:g}" if np.float32(float(f"{scale:g}")) == np.float32(scale) else str(np.float32(scale))
