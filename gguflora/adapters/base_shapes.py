"""The information about a base model that readers of adapters may use."""

from __future__ import annotations

from typing import Protocol


class BaseShapes(Protocol):
    """The shapes of a base model's weights, by Hugging Face names."""

    def shape(self, weight: str) -> tuple[int, int]:
        """Return the shape (n_out, n_in) of a weight, (n, 1) for a bias or a norm.

        Raises:
            MismatchError: if the base has no such weight.
        """

    def linear_modules(self) -> list[str]:
        """Return the names of the linear modules, in the order in which the Hugging Face model defines them.

        Raises:
            ArchitectureError: if gguflora does not know the modules of the base's architecture.
        """
