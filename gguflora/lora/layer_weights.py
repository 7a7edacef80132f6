"""Weights of an adapter that differ between the layers and modules of a model, in mergekit's manner.

A weight is a number, a gradient (numbers that are spread evenly over the layers and interpolated between them, as
mergekit 0.1.5 does in ``config.evaluate_setting`` and ``plan.py``), or either of them for each pattern of names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

import numpy as np

from gguflora.errors import AdapterError, listed
from gguflora.lora.factored import is_embedding

Gradient = float | Sequence[float]
Weight = Gradient | Mapping[str, Gradient]
"""A number, a gradient over the layers, or either by pattern of names: the first pattern that matches counts."""

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|layer|h|block|blk)\.(\d+)\.")
_LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weight of one adapter for each weight of a model.

    Attributes:
        rules: patterns of names, as in shells, and points of a gradient. A name that no pattern matches has weight 1.
    """

    rules: tuple[tuple[str, tuple[float, ...]], ...]

    @classmethod
    def from_weight(cls, weight: Weight, path: str) -> LayerWeights:
        """Check what the user gave for the adapter at a path.

        Raises:
            AdapterError: if it is no finite number, no list of such numbers, and no mapping to them.
        """
        by_pattern = weight if isinstance(weight, Mapping) else {"*": weight}
        rules = tuple((pattern, _points(given, path)) for pattern, given in by_pattern.items())
        if not rules:
            raise AdapterError(f"{path}: its weight is empty, expected numbers by pattern of names")
        return cls(rules)

    @property
    def given(self) -> Weight:
        """The weight in its shortest form."""
        short: dict[str, Gradient] = {name: points[0] if len(points) == 1 else points for name, points in self.rules}
        return short["*"] if short.keys() == {"*"} else short

    def of(self, name: str, n_layers: int) -> float:
        """Return the weight for a weight or tensor of a model with ``n_layers`` layers.

        What lies before the first layer counts as there, and what lies behind the last one as there.
        """
        points = next((points for pattern, points in self.rules if fnmatchcase(name, pattern)), (1.0,))
        found = _LAYER.search(name)
        if found:
            place = int(found[1]) / (n_layers - 1) if n_layers > 1 else 0.0
        else:
            place = 0.0 if is_embedding(name) else 1.0
        return float(np.interp(place * (len(points) - 1), np.arange(len(points)), points))

    def check_names(self, names: Iterable[str], path: str) -> None:
        """Raise ``AdapterError`` if a pattern matches none of the names of an adapter's weights."""
        known = list(names)
        for pattern, _ in self.rules:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise AdapterError(
                    f"{path}: the pattern {pattern!r} matches none of the {len(known)} weights that it changes "
                    f"({listed(known, 3)})"
                )


def count_layers(names: Iterable[str]) -> int:
    """Return the number of layers up to the last one that a name is of."""
    return 1 + max((int(found[1]) for name in names if (found := _LAYER.search(name))), default=0)


def parse_weight(text: str) -> Weight:
    """Return the weight that a text such as ``0.5``, ``0,0.5,1`` or ``*mlp*=0,1;*=0.5`` names.

    Raises:
        ValueError: if it names none.
    """
    if "=" not in text:
        return _parse_gradient(text)
    parts = [part.rpartition("=") for part in text.split(";")]
    if any(not pattern or "/" in pattern for pattern, _, _ in parts):
        raise ValueError(text)
    return {pattern: _parse_gradient(numbers) for pattern, _, numbers in parts}


def describe_weight(weight: Weight) -> str:
    """Return the text that `parse_weight` reads."""
    if isinstance(weight, Mapping):
        return ";".join(f"{pattern}={describe_weight(given)}" for pattern, given in weight.items())
    return f"{weight:g}" if isinstance(weight, int | float) else ",".join(f"{number:g}" for number in weight)


def _parse_gradient(text: str) -> Gradient:
    numbers = [float(number) for number in text.split(",")]
    return numbers[0] if len(numbers) == 1 else numbers


def _points(given: Gradient, path: str) -> tuple[float, ...]:
    points = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    try:
        numbers = tuple(float(number) for number in points)
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(abs(number) <= _LARGEST for number in numbers):
        raise AdapterError(f"{path}: its weight is {given!r}, expected a finite number, or a list of such numbers")
    return numbers
