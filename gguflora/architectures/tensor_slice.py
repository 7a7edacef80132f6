"""A part of a Hugging Face weight and its place in a GGUF tensor."""

from __future__ import annotations

from dataclasses import dataclass

from gguflora.quants.arrays import Indices


@dataclass(frozen=True, slots=True, eq=False)
class TensorSlice:
    """A part of a Hugging Face weight W and its place in a GGUF tensor T.

    ``T[start : start + n] = W[rows][:, columns] + shift``, where the right side is transposed if ``transposed`` is set.
    T's leading dimensions are flattened: expert e of (E, n_out, n_in) begins at row ``e * n_out``.

    Attributes:
        tensor: name of the GGUF tensor.
        start: first row of the slice in the tensor.
        rows: row numbers in W, in the order in which GGUF stores them; None for all rows in W's order.
        columns: column numbers in W, in the order in which GGUF stores them; None for all columns in W's order.
        transposed: whether GGUF stores the slice transposed.
        shift: number that GGUF adds to the values (Gemma's norms are stored as 1 + w).
    """

    tensor: str
    start: int = 0
    rows: Indices | None = None
    columns: Indices | None = None
    transposed: bool = False
    shift: float = 0.0
