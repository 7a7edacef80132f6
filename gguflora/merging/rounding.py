"""Round changed weights to their quant type: ggml's nearest rounding, or adaptive stochastic rounding.

A dequantized weight lies in the middle of its rounding cell, so nearest rounding undoes every small delta and the
adapter is lost. Stochastic rounding rounds up or down at random, with probabilities that make the expected weight equal
to the target:

1. Each block keeps the base's scales, or takes those of ggml's quantization of the changed weights, whichever has the
   lower expected error.
2. A gain compensates for what clipping takes from the delta. There is one gain for each range of rows that change
   together (a tensor, or an expert of a stack).
3. Codes are rounded without bias, using a random number that depends only on seed, tensor name and position. Where the
   delta is larger than about a third of a step, they are rounded to nearest. In the codebooks of IQ1, IQ2 and IQ3 eight
   or four weights move together, to one of the nearest code points and signs (csrc/README.md).

The first two steps need a pass over the rows before codes can be written.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, Literal

import numpy as np
from numpy.typing import NDArray

from gguflora.errors import NonFiniteError
from gguflora.merging.calibrated import can_calibrate, check_finite, check_reached, dequantized, round_calibrated
from gguflora.merging.file_io import read_into
from gguflora.merging.imatrix import importance_of
from gguflora.merging.moments import AllMoments, check_moments
from gguflora.placement.base_weights import BaseTensors, read_or_zeros
from gguflora.placement.rows import AnyRows, LowRankRows
from gguflora.placement.target import ChangedTensor
from gguflora.quants import kernels
from gguflora.quants.arrays import Bytes, Float32Array, Float64Array
from gguflora.quants.types import type_named
from gguflora.system.descriptors import write_at
from gguflora.system.shared_budget import SharedBudget

_CACHED_WEIGHTS: Final = 1 << 16

Mode = Literal["adaptive", "nearest"]
Sums = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RoundingOptions:
    """Options of the rounding.

    Attributes:
        mode: ``adaptive`` (stochastic rounding), or ``nearest`` for exactly ggml's bytes.
        seed: seed of the random numbers.
        merges: number of adapters that were merged into the base before; a second merge must draw other numbers.
        imatrix: importance of each column by tensor name, (n_in,) or (n_experts, n_in), for the choice of scales.
        is_calibrated: whether codes are searched where second moments are known; ``mode`` holds for all others.
        moments: second moments of the inputs by tensor name.
    """

    mode: Mode = "adaptive"
    seed: int = 0
    merges: int = 0
    imatrix: Mapping[str, Float32Array] = field(default_factory=dict)
    is_calibrated: bool = False
    moments: AllMoments = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What records of a merge call the rounding."""
        return "calibrated" if self.is_calibrated else self.mode

    def moments_of(self, target: ChangedTensor, first_row: int) -> tuple[Float32Array, Float32Array] | None:
        """Return the second moments (v and d) for a row of a tensor, or None if its codes are not searched.

        Raises:
            MismatchError: if the moments are for a tensor of another size.
        """
        if self._obstacle(target) is not None:
            return None
        n_matrices = math.prod(target.source.shape[:-2])
        check_moments(self.moments, target.name, n_matrices, target.source.n_in)
        found, matrix = self.moments[target.name], min(first_row // target.shape[-2], n_matrices - 1)
        return (found.v[matrix], found.d[matrix]) if found.counts[matrix] else None

    def why_not_calibrated(self, target: ChangedTensor) -> str | None:
        """Return why codes of a tensor, or of some of its experts, are not searched; None if all are."""
        reason = self._obstacle(target)
        if reason is not None:
            return reason
        counts = self.moments[target.name].counts
        unseen = int((counts == 0).sum())
        return f"{unseen} of its {len(counts)} matrices saw no token of the text" if unseen else None

    def _obstacle(self, target: ChangedTensor) -> str | None:
        if target.type != target.source.type:
            return f"its type changes from {target.source.type.name} to {target.type.name}"
        if len(target.shape) < 2 or not can_calibrate(target.type):
            return f"{target.type.name} is not searched"
        if target.name not in self.moments or not self.moments[target.name].counts.any():
            return "the text did not use it"
        return None

    def key(self, name: str) -> int:
        """Return the 64-bit key of a tensor's random numbers."""
        text = f"{self.seed}:{self.merges}:{name}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def importance(self, target: ChangedTensor, first_row: int) -> Float32Array | None:
        """Return the importance of the columns for a row of a tensor, or None if it is unknown.

        Raises:
            MismatchError: if the importance matrix is for a tensor of another size.
        """
        values = importance_of(self.imatrix, target.name, target.source.shape)
        if values is None:
            return None
        row: Float32Array = values[0 if len(values) == 1 else first_row // target.shape[-2]]
        return row

    def period(self, target: ChangedTensor) -> int | None:
        """Return the number of rows with the same importance (one expert), or None if all rows have the same."""
        by_matrix = target.name in self.imatrix or target.name in self.moments
        return target.shape[-2] if by_matrix and len(target.shape) > 2 else None


class RowsRounder:
    """Rounds a range of rows that change together, and measures how well they keep the delta.

    If `is_stochastic` is set, call `measure` for every block of the range, and `new` with the same bounds. Calls may
    come from several threads; `new` waits until all blocks are measured.

    Args:
        weights: weights of the base.
        target: the tensor.
        rows: the rows and their delta.
        rounding: the rounding options.
        folder: directory for a temporary file.
        total: receives the `gguflora.quants.kernels.SUMS` over all rows when the last row is done.
    """

    def __init__(
        self,
        weights: BaseTensors,
        target: ChangedTensor,
        rows: LowRankRows | AnyRows,
        rounding: RoundingOptions,
        folder: Path,
        total: Sums,
    ) -> None:
        self._weights, self._target, self._rows, self._rounding = weights, target, rows, rounding
        self._source, self._type = target.source.type, target.type
        self._importance = rounding.importance(target, rows.start)
        self._changes_anything = isinstance(rows, LowRankRows) or bool(rows.deltas)
        self.is_stochastic = (
            rounding.mode == "adaptive"
            and self._type == self._source
            and self._type.supports_stochastic
            and not weights.is_precise
            and self._changes_anything
        )
        self._total = total
        self._measured = _RowSums(rows.stop - rows.start, 2)
        self._written = _RowSums(rows.stop - rows.start, len(kernels.SUMS))
        self._new_scales = _NewScales(folder, self._type.row_bytes(target.source.n_in))

    def measure(self, start: int, stop: int) -> None:
        """First pass over the rows ``start`` to ``stop``: choose scales and measure what clipping takes."""
        offset = self._rows.start
        with self._measured.rows(start - offset, stop - offset) as sums:
            rows = self._read(start, stop)
            blocks, delta = np.empty_like(rows), _to_kernel_delta(self._rows.delta(start, stop))
            sums[:], n_new = kernels.choose_scales(rows, self._type, blocks, delta, imatrix=self._importance)
            if n_new:
                self._new_scales.put(start - offset, blocks)

    def new(self, start: int, stop: int) -> tuple[Bytes, Bytes]:
        """Return the base's bytes of the rows ``start`` to ``stop``, and the new bytes."""
        offset, rows = self._rows.start, self._read(start, stop)
        with self._written.rows(start - offset, stop - offset) as sums:
            new = self._round(rows, start, stop, sums)
        if self._written.is_complete():
            self._total[: len(kernels.SUMS)] = self._written.total()
            self._new_scales.close()
        return rows, new

    def _round(self, rows: Bytes, start: int, stop: int, sums: Sums) -> Bytes:
        if not self._changes_anything and self._type == self._source:
            return rows
        if not self._target.deltas:
            return self._requantize(rows, start, stop)
        if self.is_stochastic:
            return self._round_stochastic(rows, start, stop, sums)
        if isinstance(self._rows, LowRankRows):
            return self._round_low_rank_to_nearest(self._rows, rows, start, stop, sums)
        return self._round_to_nearest(rows, start, stop, sums)

    def _read(self, start: int, stop: int) -> Bytes:
        return read_or_zeros(self._weights.base, self._target.source, start, stop)

    def _empty(self, n_rows: int) -> Bytes:
        return np.empty((n_rows, self._type.row_bytes(self._target.source.n_in)), np.uint8)

    def _round_stochastic(self, rows: Bytes, start: int, stop: int, sums: Sums) -> Bytes:
        reached, target = self._measured.total()
        check_reached(_place(self._weights, self._target), self._type, reached, target)
        gain = 1 / float(np.clip(reached / target, 0.5, 1)) if target > 0 else 1.0
        new = self._new_scales.take(start - self._rows.start, len(rows))
        new = rows.copy() if new is None else new
        delta = _to_kernel_delta(self._rows.delta(start, stop))
        sums[:] = kernels.round_stochastic(
            rows, self._type, new, delta, gain=gain, key=self._rounding.key(self._target.name), first_row=start
        )
        if not np.isfinite(sums).all():  # a sum may overflow where the weights do not
            check_finite(_place(self._weights, self._target), self._type, dequantized(new, self._type))
        return new

    def _round_low_rank_to_nearest(self, added: LowRankRows, rows: Bytes, start: int, stop: int, sums: Sums) -> Bytes:
        new, (src, kind) = self._empty(len(rows)), self._weights.stored(self._target.source, rows, start, stop)
        delta = added.delta(start, stop)
        sums[:] = kernels.merge_rows(src, kind, new, self._type, delta, imatrix=self._importance)
        return new

    def _requantize(self, rows: Bytes, start: int, stop: int) -> Bytes:
        """Convert rows to another type; a few at a time, so that their values stay in the cache."""
        new, (src, kind) = self._empty(len(rows)), self._weights.stored(self._target.source, rows, start, stop)
        step = max(1, _CACHED_WEIGHTS // self._target.source.n_in)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            if kind == _FLOAT:
                values = src[part].view(np.float32)
            else:
                values = np.empty((len(src[part]), self._target.source.n_in), np.float32)
                kernels.dequantize_rows(src[part], kind, values)
            try:
                kernels.quantize_rows(values, self._type, new[part], imatrix=self._importance)
            except NonFiniteError as error:
                raise NonFiniteError(str(error), first + error.row, error.column) from error
        return new

    def _round_to_nearest(self, rows: Bytes, start: int, stop: int, sums: Sums) -> Bytes:
        """Add in float64 and round once, because a delta may replace weights; unchanged rows keep their bytes."""
        delta = np.asarray(self._rows.delta(start, stop), np.float64).reshape(len(rows), -1)
        stored = self._weights.values(self._target.source, start, stop).reshape(delta.shape)
        values = (stored + delta).astype(np.float32)
        is_same_type = self._type == self._source
        changed = delta.any(axis=1) if is_same_type else np.ones(len(rows), bool)
        new = rows.copy() if is_same_type else self._empty(len(rows))
        sums[changed], new[changed] = self._quantize(stored[changed], delta[changed], values[changed])
        return new

    def _quantize(self, stored: Float64Array, delta: Float64Array, values: Float32Array) -> tuple[Sums, Bytes]:
        new = self._empty(len(values))
        no_delta = kernels.Product(np.zeros((0, values.shape[1]), np.float32), np.zeros((len(values), 0), np.float32))
        source = np.ascontiguousarray(values).view(np.uint8)
        sums = kernels.merge_rows(source, _FLOAT, new, self._type, no_delta, imatrix=self._importance)
        after = np.empty(values.shape, np.float32)
        kernels.dequantize_rows(new, self._type, after)
        moved, clipped = ((after - stored) * delta).sum(axis=1), sums[:, kernels.SUMS.index("clipped")]
        error = ((after - (stored + delta)) ** 2).sum(axis=1)
        return np.stack([(stored**2).sum(axis=1), (delta**2).sum(axis=1), moved, error, clipped], axis=1), new


def calibrated_rows(
    weights: BaseTensors,
    target: ChangedTensor,
    rows: LowRankRows | AnyRows,
    rounding: RoundingOptions,
    moments: tuple[Float32Array, Float32Array],
    total: Sums,
) -> tuple[Bytes, Bytes]:
    """Round rows that change together by calibration.

    Returns:
        The base's bytes of the rows, and the new bytes. ``total`` receives `TOTALS`.
    """
    old = read_or_zeros(weights.base, target.source, rows.start, rows.stop)
    if isinstance(rows, AnyRows) and not rows.deltas:
        return old, old
    key, importance = rounding.key(target.name), rounding.importance(target, rows.start)
    delta = _to_kernel_delta(rows.delta(rows.start, rows.stop))
    name = _place(weights, target)
    with _CALIBRATED_TOGETHER.take((rows.stop - rows.start) * target.source.n_in):
        done = round_calibrated(old, target.type, delta, *moments, key=key + rows.start, imatrix=importance, name=name)
    total[:] = [*done.sums, done.moved, done.wanted]
    return old, done.blocks


TOTALS: Final = (*kernels.SUMS, "moved_h", "wanted_h")
"""Sums of a tensor: those of the kernels, and what calibration kept in the directions that matter."""

_FLOAT = type_named("F32")
_CALIBRATED_TOGETHER = SharedBudget(1 << 27)
"""Weights of the matrices that threads calibrate at the same time; each takes about 16 bytes."""


def _place(weights: BaseTensors, target: ChangedTensor) -> str:
    return f"{weights.base.path}: tensor {target.name!r}"


def _to_kernel_delta(delta: kernels.Product | Float64Array) -> kernels.KernelDelta:
    return delta if isinstance(delta, kernels.Product) else np.ascontiguousarray(delta, np.float32)


class _RowSums:
    """Sums of each row, computed by several threads. Their total does not depend on the order."""

    def __init__(self, n_rows: int, n_sums: int) -> None:
        self._sums = np.zeros((n_rows, n_sums))
        self._n_missing = n_rows
        self._lock = threading.Lock()
        self._complete = threading.Event()

    @contextmanager
    def rows(self, start: int, stop: int) -> Iterator[Sums]:
        """Yield the sums of rows for filling in. Failed rows count as done, so that no thread waits forever."""
        try:
            yield self._sums[start:stop]
        finally:
            with self._lock:
                self._n_missing -= stop - start
                if not self._n_missing:
                    self._complete.set()

    def is_complete(self) -> bool:
        """Whether all rows are done."""
        return self._complete.is_set()

    def total(self) -> Sums:
        """Wait until all rows are done and return the sums over them."""
        self._complete.wait()
        total: Sums = self._sums.sum(axis=0)
        return total


class _NewScales:
    """Blocks with new scales, kept in an unnamed temporary file between the passes, because there may be many."""

    def __init__(self, folder: Path, row_bytes: int) -> None:
        self._folder, self._row_bytes = folder, row_bytes
        self._file: IO[bytes] | None = None
        self._rows_stored: set[int] = set()
        self._lock = threading.Lock()

    def put(self, row: int, blocks: Bytes) -> None:
        with self._lock:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  (see `close`)
            self._rows_stored.add(row)
        write_at(self._file.fileno(), blocks.data, row * self._row_bytes)

    def take(self, row: int, n_rows: int) -> Bytes | None:
        if row not in self._rows_stored or self._file is None:
            return None
        blocks = np.empty((n_rows, self._row_bytes), np.uint8)
        read_into(self._file.fileno(), blocks.data, row * self._row_bytes)
        return blocks

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
