"""Drop-in replacement for ``gguf.quants``: compiled, multithreaded, and byte-identical to ggml."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gguflora.errors import NonFiniteError, QuantizationError
from gguflora.quants.kernels import dequantize_rows, quantize_rows
from gguflora.quants.threads import run_rows
from gguflora.quants.types import TYPES, GgmlType, type_named

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

__all__ = ["GgmlType", "dequantize", "quantize"]

_BLOCK_WEIGHTS = 1 << 18
"""Number of weights in one unit of work for a thread."""

_FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16}
"""Types whose arrays hold floats instead of bytes, as in ``gguf.quants``."""


def resolve_type(qtype: GGMLQuantizationType | GgmlType | int | str) -> GgmlType:
    """Return the type for a gguf enum member, a ggml type number or a type name.

    Raises:
        QuantizationError: gguflora does not support the type.
    """
    if isinstance(qtype, GgmlType):
        return qtype
    if isinstance(qtype, str):
        return type_named(qtype)
    if int(qtype) not in TYPES:
        raise QuantizationError(f"unknown quant type {qtype!r}; known are {', '.join(t.name for t in TYPES.values())}")
    return TYPES[int(qtype)]


def quantize(
    x: NDArray[Any],
    qtype: GGMLQuantizationType | GgmlType | int | str,
    *,
    imatrix: NDArray[Any] | None = None,
    threads: int | None = None,
) -> NDArray[Any]:
    """Quantize weights to the same bytes as ``ggml_quantize_chunk``.

    Args:
        x: weights of shape (..., n_in), any real dtype; each row must be a whole number of blocks.
        qtype: type to quantize to.
        imatrix: importance of the columns, (n_in,), as ``llama-imatrix`` measures it.
        threads: number of threads; by default one per usable CPU. The result does not depend on it.

    Returns:
        uint8 array of shape (..., row_bytes); float32 of shape (..., n_in) for F32, float16 for F16.

    Raises:
        NonFiniteError: a weight is NaN or infinite, or too large for the type; carries row and column, where rows are
            counted over all leading axes.
        QuantizationError: a row is not a whole number of blocks, or the type needs an imatrix.
    """
    target = resolve_type(qtype)
    weights = np.asarray(x, dtype=np.float32, order="C")
    if weights.ndim == 0:
        raise QuantizationError("expected an array of rows, found a single number")
    n_in = weights.shape[-1]
    out = np.empty((*weights.shape[:-1], target.row_bytes(n_in)), dtype=np.uint8)
    importance = None if imatrix is None else np.ascontiguousarray(imatrix, dtype=np.float32)
    rows, out_rows = _as_rows(weights), _as_rows(out)

    def work(start: int, stop: int) -> None:
        try:
            quantize_rows(rows[start:stop], target, out_rows[start:stop], imatrix=importance)
        except NonFiniteError as error:
            raise _shift_row(error, start) from None

    run_rows(len(rows), _rows_per_block(n_in), work, threads)
    return out.view(_FLOATS[target.name]) if target.name in _FLOATS else out


def dequantize(
    data: NDArray[Any],
    qtype: GGMLQuantizationType | GgmlType | int | str,
    *,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """Dequantize rows to the same float32 weights as ggml.

    Args:
        data: bytes of shape (..., row_bytes); for F32 and F16, floats of shape (..., n_in).
        qtype: type of ``data``.
        threads: number of threads; by default one per usable CPU.

    Returns:
        float32 array of shape (..., n_in).

    Raises:
        QuantizationError: the last axis is not a whole number of blocks.
    """
    source = resolve_type(qtype)
    packed = np.asarray(data, order="C")
    if packed.ndim == 0:
        raise QuantizationError("expected an array of rows, found a single number")
    packed = packed.view(np.uint8)
    row_bytes = packed.shape[-1]
    if row_bytes % source.block_bytes:
        raise QuantizationError(
            f"rows of {row_bytes} bytes are not {source.name}: it has blocks of {source.block_bytes} bytes"
        )
    n_in = row_bytes // source.block_bytes * source.block_weights
    out = np.empty((*packed.shape[:-1], n_in), dtype=np.float32)
    rows, out_rows = _as_rows(packed), _as_rows(out)

    def work(start: int, stop: int) -> None:
        dequantize_rows(rows[start:stop], source, out_rows[start:stop])

    run_rows(len(rows), _rows_per_block(n_in), work, threads)
    return out


def _as_rows(array: NDArray[Any]) -> NDArray[Any]:
    n_rows = int(np.prod(array.shape[:-1], dtype=np.int64))
    return array.reshape(n_rows, array.shape[-1])


def _rows_per_block(n_in: int) -> int:
    return max(1, _BLOCK_WEIGHTS // max(1, n_in))


def _shift_row(error: NonFiniteError, start: int) -> NonFiniteError:
    row = error.row + start
    message = str(error).replace(f"row {error.row},", f"row {row},")
    return NonFiniteError(message, row, error.column)
