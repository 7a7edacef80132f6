"""What a method may ask of the base model: the shapes of its weights, under their Hugging Face names."""

from __future__ import annotations

from typing import Protocol


class BaseShapes(Protocol):
    """A base model's weights."""

    def shape(self, weight: str) -> tuple[int, int]:
        """Shape (n_out, n_in) of a weight, by its Hugging Face name; (n, 1) of a bias or a norm.

        Raises:
            MismatchError: if the base has no such weight.
        """

    def linear_modules(self) -> list[str]:
        """Names of the modules that are matrix products, in the order in which the Hugging Face model holds them.

        Raises:
            ArchitectureError: if that is not known for the base's architecture.
        """
