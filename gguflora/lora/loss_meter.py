"""How a command on adapters gets the function that measures a loss.

The rooms that run models lie above this one, which knows only the form of the function. ``gguflora/__init__.py``, which
may import every room, says where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path


class Measure(Protocol):
    """Measures the loss with one adapter after the other."""

    def __call__(self, file: Path | None) -> float:
        """Return the mean loss of the texts' tokens, in nats, with a GGUF LoRA file, or of the base alone."""


class LossMeter(Protocol):
    """Runs a base over texts."""

    def __call__(self, base: Path, texts: Sequence[Path], threads: int | None) -> AbstractContextManager[Measure]:
        """Open the base, and return a function that measures the loss with an adapter."""


_loaders: list[Callable[[], LossMeter]] = []


def provide_loss_meter(load: Callable[[], LossMeter]) -> None:
    """Say how to load the loss meter; it is loaded when a rank is chosen by loss."""
    _loaders[:] = [load]


def load_loss_meter() -> LossMeter:
    """Return the loss meter that was provided last."""
    return _loaders[0]()
