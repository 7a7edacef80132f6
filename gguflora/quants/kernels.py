"""The kernels as functions on numpy arrays: shapes checked, status codes turned into exceptions.

Every function works on the calling thread, without the GIL; csrc/README.md describes what is behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gguflora.errors import NativeError, NonFiniteError, QuantizationError
from gguflora.quants._lib import choose_isa, ffi, lib
from gguflora.quants.arrays import Bytes, Float32Array
from gguflora.quants.types import GgmlType


def quantize_rows(
    x: Float32Array, type: GgmlType, out: Bytes, *, imatrix: Float32Array | None = None, isa: str | None = None
) -> None:
    """Quantize rows exactly as ggml does.

    Args:
        x: weights, (n_rows, n_in), C-contiguous.
        type: the type to quantize to.
        out: (n_rows, row_bytes), C-contiguous, overwritten.
        imatrix: importance of each column, (n_in,), or None.
        isa: instruction set; default is `current_isa`.

    Raises:
        NonFiniteError: a weight is NaN or infinite, or too large for the type.
        QuantizationError: shapes do not fit, or the type needs an imatrix.
    """
    n_rows, n_in = _rows(x, np.float32, "weights")
    _expect_rows(out, n_rows, type.row_bytes(n_in), "output")
    importance = _importance(type, imatrix, n_in)
    _raise_for(
        lib.gfl_quantize_rows(choose_isa(isa), type.id, _floats(x), n_rows, n_in, importance, _bytes_out(out)), type
    )


def dequantize_rows(src: Bytes, type: GgmlType, out: Float32Array, *, isa: str | None = None) -> None:
    """Write the floats that ggml reads from quantized rows.

    Args:
        src: (n_rows, row_bytes), C-contiguous.
        type: the type of ``src``.
        out: (n_rows, n_in), C-contiguous, overwritten.
        isa: instruction set; default is `current_isa`.

    Raises:
        QuantizationError: shapes do not fit.
    """
    n_rows, n_in = _rows(out, np.float32, "output")
    _expect_rows(src, n_rows, type.row_bytes(n_in), "quantized rows")
    _raise_for(lib.gfl_dequantize_rows(choose_isa(isa), type.id, _bytes(src), n_rows, n_in, _floats_out(out)), type)


@dataclass(frozen=True, slots=True)
class Product:
    """A delta of rows as a product, ``b @ a``.

    It is summed over rank in ascending order without fused operations, so the bytes depend neither on the instruction
    set nor on how rows are split over calls.

    Attributes:
        a: (rank, n_in).
        b: (n_rows, rank), factors folded in.
    """

    a: Float32Array
    b: Float32Array


KernelDelta = Product | Float32Array
"""A delta of rows: a product, or the values themselves, (n_rows, n_in)."""


def _columns(enum: str) -> tuple[str, ...]:
    """The columns that an enum of gguflora.h numbers; its last member is how many there are."""
    members = ffi.typeof(enum).elements
    return tuple(members[column].removeprefix("GFL_").lower() for column in range(len(members) - 1))


SUMS: Final = _columns("enum gfl_sum")
"""Columns of what `merge_rows` and `round_stochastic` return, with W the weights before and W' the weights written:

``weight2`` is ``|W|**2``, ``delta2`` is ``|delta|**2``, ``moved`` is ``<W' - W, delta>``, ``error2`` is
``|W' - (W + delta)|**2``, and ``clipped`` counts the weights of W + delta (`round_stochastic`: of W + gain * delta)
outside of the range of the written scales (0 for floats and codebook types: IQ1, IQ2, IQ3).
"""


def merge_rows(
    src: Bytes,
    src_type: GgmlType,
    dst: Bytes,
    dst_type: GgmlType,
    delta: KernelDelta,
    *,
    imatrix: Float32Array | None = None,
    isa: str | None = None,
) -> NDArray[np.float64]:
    """``dst = quantize(dequantize(src) + delta)`` in groups of rows that stay in the cache, as ggml rounds.

    Args:
        src: (n_rows, row bytes of ``src_type``).
        src_type: type of ``src``.
        dst: (n_rows, row bytes of ``dst_type``), overwritten; may be ``src`` itself if the types are the same.
        dst_type: type to write.
        delta: what is added.
        imatrix: importance of each column, (n_in,), or None.
        isa: instruction set; default is `current_isa`.

    Returns:
        `SUMS` of each row, (n_rows, 5).

    Raises:
        NonFiniteError: a merged weight is NaN, infinite or too large for the type.
        QuantizationError: shapes do not fit, or the type needs an imatrix.
    """
    n_rows, n_in = _delta_shape(delta)
    importance = _importance(dst_type, imatrix, n_in)
    _expect_rows(src, n_rows, src_type.row_bytes(n_in), "quantized rows")
    _expect_rows(dst, n_rows, dst_type.row_bytes(n_in), "output")
    sums = np.empty((n_rows, len(SUMS)))
    _raise_for(
        lib.gfl_merge_rows(
            choose_isa(isa),
            src_type.id,
            _bytes(src),
            dst_type.id,
            _bytes_out(dst),
            _delta(delta, n_rows, n_in),
            importance,
            _doubles_out(sums),
        ),
        dst_type,
    )
    return sums


DIRECTIONS: Final[int] = lib.GFL_DIRECTIONS
"""Directions of second moments that `search_codes` takes."""

KEPT: Final[int] = lib.GFL_KEPT
"""Output directions that `search_codes` keeps."""


def choose_scales(
    src: Bytes,
    type: GgmlType,
    dst: Bytes,
    delta: KernelDelta,
    *,
    imatrix: Float32Array | None = None,
    isa: str | None = None,
) -> tuple[NDArray[np.float64], int]:
    """First pass of stochastic rounding: choose the scales of each block.

    A block keeps the base's scales unless those of ``quantize(W + delta)`` can be expected to lose less.

    Args:
        src: (n_rows, row bytes).
        type: type of ``src`` and ``dst``, one that ``supports_stochastic``.
        dst: as ``src``, but not the same memory; overwritten: ``src``, and new scales in blocks that hold no codes yet
            (IQ1, IQ2, IQ3: the codes of ``quantize(W + delta)``).
        delta: what is added.
        imatrix: importance of each column, (n_in,), or None; where ggml would need one, all columns are then alike.
        isa: instruction set; default is `current_isa`.

    Returns:
        Of each row ``<delta, X - W>`` and ``|delta|**2``, (n_rows, 2), X being ``W + delta`` limited to the range of
        the chosen scales; and the number of blocks with new scales.

    Raises:
        NonFiniteError: a changed weight is NaN or infinite.
        QuantizationError: shapes do not fit, or the type does not support it.
    """
    n_rows, n_in = _delta_shape(delta)
    importance = ffi.NULL if imatrix is None else _importance(type, imatrix, n_in)
    _expect_stochastic(src, type, dst, n_rows, n_in)
    sums, n_new = np.empty((n_rows, lib.GFL_N_REACH)), ffi.new("int64_t *")
    _raise_for(
        lib.gfl_choose_scales(
            choose_isa(isa),
            type.id,
            _bytes(src),
            _bytes_out(dst),
            _delta(delta, n_rows, n_in),
            importance,
            _doubles_out(sums),
            n_new,
        ),
        type,
    )
    return sums, n_new[0]


def round_stochastic(
    src: Bytes,
    type: GgmlType,
    dst: Bytes,
    delta: KernelDelta,
    *,
    gain: float,
    key: int,
    first_row: int,
    isa: str | None = None,
) -> NDArray[np.float64]:
    """Second pass of stochastic rounding: write the codes, whose expectation over all keys is ``W + gain * delta``.

    Groups of weights whose delta is 0.35 steps or more (root mean square) are rounded to nearest. Blocks with a delta
    of zero are copied.

    Args:
        src: (n_rows, row bytes).
        type: type of ``src`` and ``dst``, one that ``supports_stochastic``.
        dst: (n_rows, row bytes), with the scales to write (from `choose_scales`, or a copy of ``src``); gets its codes.
        delta: what is added.
        gain: factor of delta.
        key: 64 bits that, with the number of the row and the column, make the random bits of a weight.
        first_row: number of the first row, so that bytes do not depend on how rows are split over calls.
        isa: instruction set; default is `current_isa`.

    Returns:
        `SUMS` of each row, (n_rows, 5).

    Raises:
        NonFiniteError: a changed weight is NaN or infinite.
        QuantizationError: shapes do not fit, or the type does not support it.
    """
    n_rows, n_in = _delta_shape(delta)
    _expect_stochastic(src, type, dst, n_rows, n_in)
    sums = np.empty((n_rows, len(SUMS)))
    _raise_for(
        lib.gfl_round_stochastic(
            choose_isa(isa),
            type.id,
            _bytes(src),
            _bytes_out(dst),
            _delta(delta, n_rows, n_in),
            ffi.new("gfl_draw *", (gain, key, first_row)),
            _doubles_out(sums),
        ),
        type,
    )
    return sums


def search_codes(
    src: Bytes | None,
    type: GgmlType,
    dst: Bytes,
    target: Float32Array,
    v: Float32Array,
    d: Float32Array,
    u: Float32Array,
    order: NDArray[np.int32],
    limits: Sequence[float],
    *,
    isa: str | None = None,
) -> int:
    """Calibrated rounding of a whole matrix: move codes and scales to lower ``tr(E H E^T) + |U^T E|_H^2``.

    E is ``W' - target`` and H ``v.T @ v + diag(d)``. The bytes depend neither on the instruction set nor on threads.

    Args:
        src: the base's rows, whose codes are the start; None to start from those of ``dst``.
        type: type of ``src`` and ``dst``: one with levels, not a codebook.
        dst: (n_rows, row bytes) with the scales to write; gets its codes.
        target: the wanted weights, (n_rows, n_in).
        v: (DIRECTIONS, n_in).
        d: (n_in,), not negative.
        u: (n_rows, KEPT).
        order: order of the rows; each sees the moves of those before it.
        limits: for each pass, how many steps the best move of a code must exceed. In a pass of 0 no code moves, but the
            half-precision numbers in the blocks of each row are fitted, all at once, if the type has any.
        isa: instruction set; default is `current_isa`.

    Returns:
        The number of moves.

    Raises:
        NonFiniteError: a wanted weight is NaN or infinite.
        QuantizationError: shapes do not fit.
    """
    n_rows, n_in = _rows(target, np.float32, "target")
    for quantized in (dst,) if src is None else (src, dst):
        _expect_rows(quantized, n_rows, type.row_bytes(n_in), "quantized rows")
    shapes = {"v": (v, (DIRECTIONS, n_in)), "d": (d, (n_in,)), "u": (u, (n_rows, KEPT)), "order": (order, (n_rows,))}
    for name, (array, shape) in shapes.items():
        dtype = np.dtype(np.int32 if name == "order" else np.float32)
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            raise QuantizationError(
                f"{name}: expected a C-contiguous {dtype} array of shape {shape}, found {array.dtype} of {array.shape}"
            )
    if n_rows and not (order.min() >= 0 and order.max() < n_rows):
        raise QuantizationError(f"order: expected rows from 0 to {n_rows - 1}, found {order.min()} to {order.max()}")
    steps, rows, moves = ffi.new("float[]", list(limits)), ffi.from_buffer("int32_t[]", order), ffi.new("int64_t *")
    search = ffi.new(
        "gfl_search *",
        (n_rows, n_in, _floats(target), _floats(v), _floats(d), _floats(u), rows, steps, len(limits)),
    )
    source = ffi.NULL if src is None else _bytes(src)
    _raise_for(lib.gfl_search_codes(choose_isa(isa), type.id, source, _bytes_out(dst), search, moves), type)
    return int(moves[0])


def has_steps(type: GgmlType) -> bool:
    """Whether a type has levels with steps between them, as all block types but the codebooks IQ1, IQ2 and IQ3."""
    return type.supports_stochastic and not type.name.startswith(("IQ1", "IQ2", "IQ3"))


def mean_step(rows: Bytes, type: GgmlType) -> float:
    """Return the mean distance of neighbouring levels over all weights of some rows.

    Args:
        rows: (n_rows, row bytes).
        type: their type, one that `has_steps`.
    """
    n_rows, row_bytes = _rows(rows, np.uint8, "quantized rows")
    n_in, mean = row_bytes // type.block_bytes * type.block_weights, ffi.new("double *")
    _raise_for(lib.gfl_mean_step(choose_isa(None), type.id, _bytes(rows), n_rows, n_in, mean), type)
    return float(mean[0])


def _raise_for(result: Any, type: GgmlType) -> None:  # noqa: ANN401  (a cffi struct)
    if result.status == lib.GFL_DONE:
        return
    row, column = result.row, result.column
    if result.status == lib.GFL_NOT_FINITE:
        raise NonFiniteError(f"NaN or infinite weight at row {row}, column {column}", row, column)
    if result.status == lib.GFL_OVERFLOWS:
        raise NonFiniteError(f"the weight at row {row}, column {column} is too large for {type.name}", row, column)
    if result.status == lib.GFL_NO_MEMORY:
        raise NativeError("no memory for one group of rows")
    raise NativeError(f"no kernel for {type.name} (id {type.id}) in this build")


def _rows(array: NDArray[Any], dtype: type[np.generic], what: str) -> tuple[int, int]:
    if array.dtype != dtype or array.ndim != 2 or not array.flags.c_contiguous:
        raise QuantizationError(
            f"{what}: expected a C-contiguous {np.dtype(dtype).name} array of rows, found {array.dtype} {array.shape}"
        )
    n_rows, n_in = array.shape
    return n_rows, n_in


def _expect_rows(array: Bytes, n_rows: int, row_bytes: int, what: str) -> None:
    if _rows(array, np.uint8, what) != (n_rows, row_bytes):
        raise QuantizationError(f"{what}: expected shape ({n_rows}, {row_bytes}), found {array.shape}")


def _expect_stochastic(src: Bytes, type: GgmlType, dst: Bytes, n_rows: int, n_in: int) -> None:
    if not type.supports_stochastic:
        raise QuantizationError(f"{type.name} cannot be rounded stochastically; only to nearest")
    _expect_rows(src, n_rows, type.row_bytes(n_in), "quantized rows")
    _expect_rows(dst, n_rows, type.row_bytes(n_in), "output")
    if np.may_share_memory(src, dst):
        raise QuantizationError("output: must not overlap the quantized rows it is made from")


def _delta_shape(delta: KernelDelta) -> tuple[int, int]:
    if not isinstance(delta, Product):
        return _rows(delta, np.float32, "delta")
    rank, n_in = _rows(delta.a, np.float32, "a")
    n_rows, b_rank = _rows(delta.b, np.float32, "b")
    if b_rank != rank:
        raise QuantizationError(f"a has rank {rank}, b has rank {b_rank}")
    return n_rows, n_in


def _importance(type: GgmlType, imatrix: Float32Array | None, n_in: int) -> Any:  # noqa: ANN401  (cffi pointers)
    if imatrix is None:
        if type.needs_imatrix:
            raise QuantizationError(f"{type.name} cannot be quantized without an importance matrix (imatrix)")
        return ffi.NULL
    if imatrix.shape != (n_in,) or imatrix.dtype != np.float32 or not imatrix.flags.c_contiguous:
        raise QuantizationError(
            f"imatrix: expected a C-contiguous float32 array of shape ({n_in},), found {imatrix.dtype} {imatrix.shape}"
        )
    if not np.isfinite(imatrix).all():
        column = int(np.flatnonzero(~np.isfinite(imatrix))[0])
        raise NonFiniteError(f"NaN or infinite importance at column {column}", 0, column)
    return _floats(imatrix)


def _delta(delta: KernelDelta, n_rows: int, n_in: int) -> Any:  # noqa: ANN401
    """A gfl_delta, valid as long as ``delta`` lives."""
    if isinstance(delta, Product):
        return ffi.new("gfl_delta *", (n_rows, n_in, _floats(delta.a), _floats(delta.b), len(delta.a), ffi.NULL))
    return ffi.new("gfl_delta *", (n_rows, n_in, ffi.NULL, ffi.NULL, 0, _floats(delta)))


def _floats(array: Float32Array) -> Any:  # noqa: ANN401  (cffi pointers)
    return ffi.from_buffer("float[]", array)


def _floats_out(array: Float32Array) -> Any:  # noqa: ANN401
    return ffi.from_buffer("float[]", array, require_writable=True)


def _bytes(array: Bytes) -> Any:  # noqa: ANN401
    return ffi.from_buffer("uint8_t[]", array)


def _bytes_out(array: Bytes) -> Any:  # noqa: ANN401
    return ffi.from_buffer("uint8_t[]", array, require_writable=True)


def _doubles_out(array: NDArray[np.float64]) -> Any:  # noqa: ANN401
    return ffi.from_buffer("double[]", array, require_writable=True)
