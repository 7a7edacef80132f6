"""Read the weights of a base before quantization, in the shapes and row order of its GGUF tensors.

The source is a GGUF file of a more precise type, or a Hugging Face directory, whose weights `gguflora.architectures`
maps to GGUF tensors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from gguflora.architectures import TensorSlice
from gguflora.architectures.base_model import BaseModel, describe, flat_shape
from gguflora.architectures.mapping import cut_positions, decay_of, is_conv1d, is_cut, is_transposed_expert, slices_of
from gguflora.errors import GgufError, MismatchError
from gguflora.files.checkpoint import Checkpoint, StoredWeight
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING, GgufFile, Shape, TensorEntry
from gguflora.quants import kernels
from gguflora.quants.arrays import Float32Array, Indices
from gguflora.quants.types import TYPES

_TOLERANCE: Final = {"F32": 1e-2, "F16": 1e-2, "BF16": 1e-2, "Q8_0": 2e-2}
_QUANTIZED_TOLERANCE: Final = 0.8
"""Highest relative difference due to quantization: 1-bit types reach 0.5, unrelated weights differ by 1.4."""
_SAMPLES: Final = 16


class _Source(Protocol):
    def check(self, tensor: str) -> None: ...

    def rows(self, tensor: str, start: int, stop: int) -> Float32Array: ...

    def close(self) -> None: ...


class UnquantizedBase:
    """The weights of a base before quantization. Create it with `open`."""

    def __init__(self, path: Path, source: _Source) -> None:
        self.path = path
        self._source = source

    @classmethod
    def open(cls, path: str | os.PathLike[str], model: BaseModel) -> UnquantizedBase:
        """Open a GGUF file or a Hugging Face directory that holds the weights of ``model``.

        Raises:
            FormatError: if the file or directory is damaged or holds no weights.
            MismatchError: if the architectures differ.
        """
        location = Path(path)
        source = _HfWeights(location, model) if location.is_dir() else _GgufWeights(location, model)
        return cls(location, source)

    def check(self, base: GgufFile, tensors: Iterable[str]) -> None:
        """Compare samples of tensors with the quantized base.

        Raises:
            MismatchError: if a tensor is missing, has another shape, or differs by more than quantization explains.
        """
        for name in tensors:
            self._source.check(name)
            entry = base.tensors[name]
            difference = norm = 0.0
            for row in sorted({int(row) for row in np.linspace(0, entry.n_rows - 1, _SAMPLES)}):
                stored, values = _dequantize(base, entry, row, row + 1), self.rows(name, row, row + 1)
                difference += float(np.square(stored - values, dtype=np.float64).sum())
                norm += float(np.square(stored, dtype=np.float64).sum())
            if not difference <= _TOLERANCE.get(entry.type.name, _QUANTIZED_TOLERANCE) ** 2 * norm:
                raise MismatchError(
                    f"{self.path}: {name!r} differs from the one in {base.path} by {np.sqrt(difference / norm):.0%}, "
                    f"more than quantization to {entry.type.name} explains; is it the same model?"
                )

    def rows(self, tensor: str, start: int, stop: int) -> Float32Array:
        """Read rows ``start`` to ``stop`` of a tensor, as float32 (stop - start, n_in), in the base's row order.

        Leading dimensions count as rows; a vector is one row. Safe to call from several threads.

        Raises:
            MismatchError: if the tensor is missing.
            FormatError: if it cannot be read.
        """
        return self._source.rows(tensor, start, stop)

    def close(self) -> None:
        """Close the files."""
        self._source.close()

    def __enter__(self) -> UnquantizedBase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _GgufWeights:
    """Reads tensors of the same names from another GGUF file of any quant types."""

    def __init__(self, path: Path, model: BaseModel) -> None:
        self._model = model
        self._file = GgufFile(path)
        try:
            _check_architecture(self._file, model)
        except BaseException:
            self._file.close()
            raise

    def check(self, tensor: str) -> None:
        entry, shape = self._file.tensors.get(tensor), _shape_in(self._model, tensor)
        if entry is None:
            raise MismatchError(f"{self._file.path}: has no tensor {tensor!r}, which {self._model.path} has")
        if entry.shape != shape:
            raise MismatchError(
                f"{self._file.path}: tensor {tensor!r} is {entry.shape}, but {shape} in {self._model.path}"
            )

    def rows(self, tensor: str, start: int, stop: int) -> Float32Array:
        self.check(tensor)
        return _dequantize(self._file, self._file.tensors[tensor], start, stop)

    def close(self) -> None:
        self._file.close()


def _shape_in(model: BaseModel, tensor: str) -> Shape:
    if tensor not in model.shapes:
        raise MismatchError(f"{model.path}: has no tensor {tensor!r}")
    return model.shapes[tensor]


def _check_architecture(file: GgufFile, model: BaseModel) -> None:
    found = describe(file, mmproj=True).architecture
    if found != model.architecture:
        raise MismatchError(f"{file.path}: is {found!r}, but {model.path} is {model.architecture!r}")


def _dequantize(file: GgufFile, tensor: TensorEntry, start: int, stop: int) -> Float32Array:
    if tensor.type.id not in TYPES:
        raise GgufError(f"{file.path}: tensor {tensor.name!r} is {tensor.type.name}, expected weights")
    values = np.empty((stop - start, tensor.n_in), np.float32)
    kernels.dequantize_rows(file.read_rows(tensor, start, stop), tensor.type, values)
    return values


@dataclass(frozen=True, slots=True)
class _WeightPart:
    """A slice of a GGUF tensor and the weight that it comes from.

    Attributes:
        weight: the weight on disk.
        tensor_slice: the slice of the GGUF tensor.
        fits: whether the slices of the weight cover all of its rows and columns.
        flipped: whether the weight is stored as (n_in, n_out).
        decay: whether GGUF stores ``-exp(value)``.
    """

    weight: StoredWeight
    tensor_slice: TensorSlice
    fits: bool = True
    flipped: bool = False
    decay: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, (n_out, n_in)."""
        return _shape(self.weight, flipped=self.flipped)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns of the slice as GGUF stores it."""
        n_rows, n_columns = self.shape
        n_rows = n_rows if self.tensor_slice.rows is None else len(self.tensor_slice.rows)
        n_columns = n_columns if self.tensor_slice.columns is None else len(self.tensor_slice.columns)
        return (n_columns, n_rows) if self.tensor_slice.transposed else (n_rows, n_columns)

    @property
    def stop(self) -> int:
        """Row of the tensor after the last row of the slice."""
        return self.tensor_slice.start + self.stored_shape[0]


class _HfWeights:
    """Reads GGUF tensors from the weights of a Hugging Face directory."""

    def __init__(self, folder: Path, model: BaseModel) -> None:
        self._model = model
        self._checkpoint = Checkpoint(folder)
        self._lock = threading.Lock()
        self._flipped: tuple[str, Float32Array] | None = None
        by_tensor: dict[str, list[_WeightPart]] = {}
        for name, weight in self._checkpoint.weights.items():
            for part in _weight_parts(model, name, weight):
                if part.tensor_slice.tensor in model.shapes:
                    by_tensor.setdefault(part.tensor_slice.tensor, []).append(part)
        if OUTPUT in model.shapes and OUTPUT not in by_tensor:  # tied here, but not in the GGUF file
            by_tensor[OUTPUT] = by_tensor.get(TOKEN_EMBEDDING, [])
        self._parts = {tensor: _sort_parts(parts) for tensor, parts in by_tensor.items()}

    def check(self, tensor: str) -> None:
        """Raise ``MismatchError`` unless the parts of a tensor cover each of its rows exactly once."""
        parts = self._parts.get(tensor, [])
        covered, (n_rows, n_columns) = 0, flat_shape(_shape_in(self._model, tensor))
        for part in parts:
            if not part.fits or part.tensor_slice.start != covered or part.stored_shape[1] != n_columns:
                break
            covered = part.stop
        if covered != n_rows:
            found = ", ".join(f"{part.weight.name!r} {part.shape}" for part in parts[:8]) or "no weight"
            raise MismatchError(
                f"{self._checkpoint.folder}: has {found} for {tensor!r} of {self._model.path}, which is "
                f"{self._model.shapes[tensor]}; is it the same model, with its weights in safetensors?"
            )

    def rows(self, tensor: str, start: int, stop: int) -> Float32Array:
        self.check(tensor)
        if len(self._model.shapes[tensor]) == 1:
            return self._read_vector(tensor)
        values = np.empty((stop - start, self._model.shapes[tensor][-1]), np.float32)
        for part in self._parts[tensor]:
            low, high = max(part.tensor_slice.start, start), min(part.stop, stop)
            if low < high:
                values[low - start : high - start] = self._read(
                    part, low - part.tensor_slice.start, high - part.tensor_slice.start
                )
        return values

    def _read_vector(self, tensor: str) -> Float32Array:
        """Read a vector as one row."""
        columns = [self._read(part, 0, part.stored_shape[0]) for part in self._parts[tensor]]
        return np.concatenate(columns).reshape(1, -1)

    def _read(self, part: _WeightPart, start: int, stop: int) -> Float32Array:
        """Read rows of a slice, counted from its first row, with the values that GGUF stores."""
        tensor_slice, n_rows = part.tensor_slice, part.shape[0]
        numbers = np.arange(n_rows) if tensor_slice.rows is None else tensor_slice.rows
        values = self._weight_rows(part, numbers if tensor_slice.transposed else numbers[start:stop])
        values = values if tensor_slice.columns is None else values[:, tensor_slice.columns]
        values = values.T[start:stop] if tensor_slice.transposed else values
        return -np.exp(values) if part.decay else values + np.float32(tensor_slice.shift)

    def _weight_rows(self, part: _WeightPart, rows: Indices) -> Float32Array:
        if not part.flipped:
            return self._checkpoint.read_rows(part.weight, rows)
        with self._lock:  # a row is a column on disk: keep the transposed weight for the next blocks
            if self._flipped is None or self._flipped[0] != part.weight.name:
                whole = self._checkpoint.read_rows(part.weight, np.arange(part.weight.n_rows))
                self._flipped = part.weight.name, whole.T
            return self._flipped[1][rows]

    def close(self) -> None:
        self._checkpoint.close()


def _sort_parts(parts: Sequence[_WeightPart]) -> list[_WeightPart]:
    """Sort parts by row and drop duplicates: a checkpoint may hold one weight under several names."""
    unique = {(part.tensor_slice.start, part.stored_shape): part for part in reversed(parts)}
    return sorted(unique.values(), key=lambda part: part.tensor_slice.start)


def _weight_parts(model: BaseModel, name: str, weight: StoredWeight) -> list[_WeightPart]:
    """Return the slices that a weight makes up; an empty list if GGUF does not store it."""
    decay = decay_of(model, name)
    if decay is not None:
        if weight.n_rows == 1:  # Kimi Linear's has the shape (1, 1, n_heads, 1)
            weight = replace(weight, n_rows=weight.n_columns, n_columns=1)
        return [_WeightPart(weight, decay, decay=True)]
    try:
        slices = slices_of(model, name)
    except MismatchError:  # its slices depend on tensors that the base lacks
        return []
    flipped = is_conv1d(model, name) or is_transposed_expert(model, name)
    fits = _covers(slices, *_shape(weight, flipped=flipped))
    return [_without_padding(model, _WeightPart(weight, tensor_slice, fits, flipped)) for tensor_slice in slices]


def _shape(weight: StoredWeight, *, flipped: bool) -> tuple[int, int]:
    return (weight.n_columns, weight.n_rows) if flipped else (weight.n_rows, weight.n_columns)


def _covers(slices: Sequence[TensorSlice], n_out: int, n_in: int) -> bool:
    """Whether slices with explicit rows or columns cover all of them."""
    rows = sum(len(tensor_slice.rows) for tensor_slice in slices if tensor_slice.rows is not None)
    columns = sum(len(tensor_slice.columns) for tensor_slice in slices if tensor_slice.columns is not None)
    return rows in {0, n_out} and columns in {0, n_in}


def _without_padding(model: BaseModel, part: _WeightPart) -> _WeightPart:
    """Drop the rows of a vocabulary or of positions that GGUF does not store."""
    skipped = cut_positions(model, part.tensor_slice.tensor, part.shape[0])
    if skipped:
        return replace(part, tensor_slice=replace(part.tensor_slice, rows=np.arange(skipped, part.shape[0])))
    rows = model.shapes.get(part.tensor_slice.tensor, (0,))[0] if is_cut(model) else 0
    if part.tensor_slice.tensor not in {TOKEN_EMBEDDING, OUTPUT} or not 0 < rows < part.shape[0]:
        return part
    return replace(part, tensor_slice=replace(part.tensor_slice, rows=np.arange(rows)))
