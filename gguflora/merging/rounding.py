"""How changed weights become codes of their quant type: by ggml's own rounding to nearest, or by stochastic rounding.

A dequantized weight lies in the middle of its rounding cell, so nearest rounding puts a small change back, always: the
adapter is lost. Stochastic rounding goes up or down at random, such that the expected weight is the wanted one:

1. For each block the base's scales are kept, or those of ggml's quantization of the changed weights are taken,
   whichever has the lower expected error.
2. What clipping at the lowest and highest level takes from the change is put back by a gain, one for a range of rows
   that change together (a tensor; an expert of a stack).
3. Codes are rounded without bias, by a random number that depends on seed, tensor name and place alone; where the
   change is larger than about a third of a step, to the nearest. In the codebooks of IQ1, IQ2 and IQ3 eight or four
   weights move together, to one of the nearest points and signs (csrc/kernels/dither_codebook.h).

The first two need a pass over the rows before the codes can be made.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, Literal

import numpy as np
from numpy.typing import NDArray

from gguflora.errors import QuantizationError
from gguflora.merging.imatrix import importance_of
from gguflora.placement.base_weights import BaseTensors, read_or_zeros
from gguflora.placement.rows import AnyRows, LowRankRows
from gguflora.placement.target import ChangedTensor
from gguflora.quants import kernels
from gguflora.quants.arrays import Bytes, Float32Array, Float64Array
from gguflora.quants.types import type_named

_LEAST_REACHED: Final = 0.01

Mode = Literal["adaptive", "nearest"]
Sums = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RoundingOptions:
    """How to round.

    Attributes:
        mode: ``adaptive``, or ``nearest`` for exactly the bytes that ggml would make.
        seed: of the random numbers.
        merges: how many adapters the base has taken in before; a second merge must not draw the same numbers.
        imatrix: importance of each column by tensor name, (n_in,) or (n_experts, n_in), for the search of scales.
    """

    mode: Mode = "adaptive"
    seed: int = 0
    merges: int = 0
    imatrix: Mapping[str, Float32Array] = field(default_factory=dict)

    def key(self, name: str) -> int:
        """64 bits from which a tensor's random numbers are made."""
        text = f"{self.seed}:{self.merges}:{name}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def importance(self, target: ChangedTensor, first_row: int) -> Float32Array | None:
        """Importance of the columns in a row of a tensor, if it is known.

        Raises:
            MismatchError: if the importance matrix was made for a tensor of another size.
        """
        values = importance_of(self.imatrix, target.name, target.source.shape)
        if values is None:
            return None
        row: Float32Array = values[0 if len(values) == 1 else first_row // target.shape[-2]]
        return row

    def period(self, target: ChangedTensor) -> int | None:
        """Number of rows after which the importance changes, if it does."""
        return target.shape[-2] if target.name in self.imatrix and len(target.shape) > 2 else None


class RowsRounder:
    """New bytes for a range of rows that change together, and how well they keep the change.

    Where `two_passes` is set, `measure` must have been called for every block of the range, with the same bounds,
    before `new` returns; calls may come from several threads, `new` waits.

    Args:
        weights: of the base.
        target: the tensor.
        rows: its rows, and what is added to them.
        rounding: how.
        folder: where a temporary file may be made.
        total: gets the sums over all rows when the last of them is done, in the order of `_native.SUMS`.
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
        self.two_passes = (
            rounding.mode == "adaptive"
            and self._type == self._source
            and self._type.supports_stochastic
            and not weights.is_precise
            and self._changes_anything
        )
        self._total = total
        self._measured = _RowSums(rows.stop - rows.start, 2)
        self._written = _RowSums(rows.stop - rows.start, len(kernels.SUMS))
        self._scales = _ChosenScales(folder, self._type.row_bytes(target.source.n_in))

    def measure(self, start: int, stop: int) -> None:
        """First pass over the rows ``start`` to ``stop``: choose scales, measure what clipping takes."""
        offset = self._rows.start
        with self._measured.rows(start - offset, stop - offset) as sums:
            rows = self._read(start, stop)
            chosen, delta = np.empty_like(rows), _single(self._rows.delta(start, stop))
            sums[:], n_new = kernels.choose_scales(rows, self._type, chosen, delta, imatrix=self._importance)
            if n_new:
                self._scales.put(start - offset, chosen)

    def new(self, start: int, stop: int) -> tuple[Bytes, Bytes]:
        """The base's bytes of the rows ``start`` to ``stop``, and the new ones."""
        offset, rows = self._rows.start, self._read(start, stop)
        with self._written.rows(start - offset, stop - offset) as sums:
            new = self._round(rows, start, stop, sums)
        if self._written.is_complete():
            self._total[:] = self._written.total()
            self._scales.close()
        return rows, new

    def _round(self, rows: Bytes, start: int, stop: int, sums: Sums) -> Bytes:
        if not self._changes_anything and self._type == self._source:
            return rows
        if self.two_passes:
            return self._dither(rows, start, stop, sums)
        if isinstance(self._rows, LowRankRows):
            return self._nearest_product(self._rows, rows, start, stop, sums)
        return self._nearest(rows, start, stop, sums)

    def _read(self, start: int, stop: int) -> Bytes:
        return read_or_zeros(self._weights.base, self._target.source, start, stop)

    def _empty(self, n_rows: int) -> Bytes:
        return np.empty((n_rows, self._type.row_bytes(self._target.source.n_in)), np.uint8)

    def _dither(self, rows: Bytes, start: int, stop: int, sums: Sums) -> Bytes:
        reached, wanted = self._measured.total()
        if not (
            np.isfinite(wanted) and reached >= _LEAST_REACHED * wanted
        ):  # no scale holds it: float16's range is left
            raise QuantizationError(
                f"{self._weights.base.path}: tensor {self._target.name!r}: the changed weights are too large for "
                f"{self._type.name}; is the adapter's scale right?"
            )
        gain = 1 / float(np.clip(reached / wanted, 0.5, 1)) if wanted > 0 else 1.0
        new = self._scales.take(start - self._rows.start, len(rows))
        new = rows.copy() if new is None else new
        delta = _single(self._rows.delta(start, stop))
        sums[:] = kernels.round_stochastic(
            rows, self._type, new, delta, gain=gain, key=self._rounding.key(self._target.name), first_row=start
        )
        return new

    def _nearest_product(self, added: LowRankRows, rows: Bytes, start: int, stop: int, sums: Sums) -> Bytes:
        new, (src, kind) = self._empty(len(rows)), self._weights.stored(self._target.source, rows, start, stop)
        delta = added.delta(start, stop)
        sums[:] = kernels.merge_rows(src, kind, new, self._type, delta, imatrix=self._importance)
        return new

    def _nearest(self, rows: Bytes, start: int, stop: int, sums: Sums) -> Bytes:
        """Summed in float64 and rounded once, since a change may be a replacement; unchanged rows keep their bytes."""
        delta = np.asarray(self._rows.delta(start, stop), np.float64).reshape(len(rows), -1)
        stored = self._weights.values(self._target.source, start, stop).reshape(delta.shape)
        wanted = (stored + delta).astype(np.float32)
        keeps = self._type == self._source
        touched = delta.any(axis=1) if keeps else np.ones(len(rows), bool)
        new = rows.copy() if keeps else self._empty(len(rows))
        sums[touched], new[touched] = self._to_nearest(stored[touched], delta[touched], wanted[touched])
        return new

    def _to_nearest(self, stored: Float64Array, delta: Float64Array, wanted: Float32Array) -> tuple[Sums, Bytes]:
        new = self._empty(len(wanted))
        nothing = kernels.Product(np.zeros((0, wanted.shape[1]), np.float32), np.zeros((len(wanted), 0), np.float32))
        source = np.ascontiguousarray(wanted).view(np.uint8)
        sums = kernels.merge_rows(source, _FLOAT, new, self._type, nothing, imatrix=self._importance)
        after = np.empty(wanted.shape, np.float32)
        kernels.dequantize_rows(new, self._type, after)
        moved, clipped = ((after - stored) * delta).sum(axis=1), sums[:, kernels.SUMS.index("clipped")]
        error = ((after - (stored + delta)) ** 2).sum(axis=1)
        return np.stack([(stored**2).sum(axis=1), (delta**2).sum(axis=1), moved, error, clipped], axis=1), new


_FLOAT = type_named("F32")


def _single(delta: kernels.Product | Float64Array) -> kernels.KernelDelta:
    return delta if isinstance(delta, kernels.Product) else np.ascontiguousarray(delta, np.float32)


class _RowSums:
    """Sums by row, filled in by several threads, and their total, which does not depend on how."""

    def __init__(self, n_rows: int, n_sums: int) -> None:
        self._sums = np.zeros((n_rows, n_sums))
        self._left = n_rows
        self._lock = threading.Lock()
        self._complete = threading.Event()

    @contextmanager
    def rows(self, start: int, stop: int) -> Iterator[Sums]:
        """The sums of some rows, to be filled in; counted even if that fails, for nobody may wait for ever."""
        try:
            yield self._sums[start:stop]
        finally:
            with self._lock:
                self._left -= stop - start
                if not self._left:
                    self._complete.set()

    def is_complete(self) -> bool:
        """Whether all rows have been seen to."""
        return self._complete.is_set()

    def total(self) -> Sums:
        """The sums over all rows; waits for them."""
        self._complete.wait()
        total: Sums = self._sums.sum(axis=0)
        return total


class _ChosenScales:
    """Blocks whose scales are new, kept between the passes in a file without a name: they may be many."""

    def __init__(self, folder: Path, row_bytes: int) -> None:
        self._folder, self._row_bytes = folder, row_bytes
        self._file: IO[bytes] | None = None
        self._known: set[int] = set()
        self._lock = threading.Lock()

    def put(self, row: int, blocks: Bytes) -> None:
        with self._lock:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  (see `close`)
            self._known.add(row)
        view, offset = memoryview(blocks.data).cast("B"), row * self._row_bytes
        while view:
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count

    def take(self, row: int, n_rows: int) -> Bytes | None:
        if row not in self._known or self._file is None:
            return None
        blocks = np.empty((n_rows, self._row_bytes), np.uint8)
        view, offset = memoryview(blocks.data).cast("B"), row * self._row_bytes
        while view:
            count = os.preadv(self._file.fileno(), [view], offset)
            view, offset = view[count:], offset + count
        return blocks

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
