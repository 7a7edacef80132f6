"""How a calibrated merge gets the function that runs its base.

The rooms that run models lie above this one, which knows only the form of the function. ``gguflora/__init__.py``, which
may import every room, says where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gguflora.merging.moments import Moments


class Collector(Protocol):
    """Runs a base with its adapters over texts and sums over the inputs of weights."""

    def __call__(
        self,
        base: Path,
        adapters: Sequence[tuple[str | os.PathLike[str], float]],
        weights: Mapping[str, tuple[int, int]],
        texts: Sequence[str | os.PathLike[str]],
        threads: int,
    ) -> tuple[dict[str, Moments], list[str]]:
        """Return the moments of the weights that the base used, and warnings."""


_loaders: list[Callable[[], Collector]] = []


def provide_collector(load: Callable[[], Collector]) -> None:
    """Say how to load the collector; it is loaded when a merge needs it."""
    _loaders[:] = [load]


def load_collector() -> Collector:
    """Return the collector that was provided last."""
    return _loaders[0]()
