"""The quant types that the kernels know: ggml's numbers, names and block sizes."""

from __future__ import annotations

from dataclasses import dataclass

from gguflora.errors import QuantizationError
from gguflora.quants._lib import ffi, lib


@dataclass(frozen=True)
class GgmlType:
    """A quant type: ggml's number and name for it, the size of its blocks, and what kernels need or can do.

    Attributes:
        id: ggml's number.
        name: ggml's name.
        block_weights: weights per block.
        block_bytes: bytes per block.
        needs_imatrix: whether ggml refuses to quantize without an importance matrix.
        supports_stochastic: whether `choose_scales` and `round_stochastic` know the type.
    """

    id: int
    name: str
    block_weights: int
    block_bytes: int
    needs_imatrix: bool = False
    supports_stochastic: bool = False

    @property
    def quantizes(self) -> bool:
        """Whether weights can be quantized to this type without an importance matrix."""
        return not self.needs_imatrix

    def row_bytes(self, n_in: int) -> int:
        """Bytes of a row of ``n_in`` weights.

        Raises:
            QuantizationError: ``n_in`` is not a whole number of blocks.
        """
        if n_in % self.block_weights:
            raise QuantizationError(
                f"rows of {n_in} weights cannot be stored as {self.name}: must be a multiple of {self.block_weights}"
            )
        return n_in // self.block_weights * self.block_bytes


def _read_types() -> dict[int, GgmlType]:
    rows = (lib.gfl_type_at(index) for index in range(lib.gfl_type_count()))
    return {
        t.id: GgmlType(
            t.id,
            ffi.string(t.name).decode(),
            t.block_weights,
            t.block_bytes,
            bool(t.needs_imatrix),
            bool(t.supports_stochastic),
        )
        for t in rows
    }


TYPES: dict[int, GgmlType] = _read_types()


def type_named(name: str) -> GgmlType:
    """The type ggml calls ``name`` (``Q4_K``; case does not matter).

    Raises:
        QuantizationError: gguflora has no such type.
    """
    for known in TYPES.values():
        if known.name == name.upper():
            return known
    raise QuantizationError(f"unknown quant type {name!r}; known are {', '.join(t.name for t in TYPES.values())}")
