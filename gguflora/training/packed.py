"""The packed weights of a GGUF file, mapped into memory, and panels of them as floats.

A weight stays what it is in the file: rows of quantized blocks in ggml's order. Whoever multiplies with it walks over
panels of rows, each dequantized into one buffer of the thread, and puts the results into the order of Hugging Face.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from gguflora.architectures.base_model import BaseModel, describe
from gguflora.architectures.mapping import slices_of
from gguflora.architectures.tensor_slice import TensorSlice
from gguflora.errors import ArchitectureError
from gguflora.files.gguf import GgufFile, Metadata, Shape
from gguflora.quants.arrays import Bytes, Float32Array, Indices
from gguflora.quants.kernels import dequantize_rows
from gguflora.quants.threads import run_rows
from gguflora.quants.types import GgmlType
from gguflora.system.memory import forget_pages

PANEL_WEIGHTS: Final = 1 << 21
"""Weights dequantized at a time: 8 MB of floats, which stay in the cache that the cores share."""

_BLOCK_WEIGHTS: Final = 1 << 17
"""Weights that a thread dequantizes at a time."""

_LOCAL: Final = threading.local()


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """Consecutive rows of a GGUF tensor.

    Attributes:
        packed: uint8 (n_rows, row_bytes), in the mapped file.
        type: their quant type.
        mapped: the mapped file, if they lie in one.
        offset: where the first row begins in the file.
    """

    packed: Bytes
    type: GgmlType
    mapped: mmap.mmap | None = None
    offset: int = 0

    def part(self, start: int, count: int) -> PackedRows:
        """Some of the rows."""
        offset = self.offset + start * self.packed.shape[1]
        return PackedRows(self.packed[start : start + count], self.type, self.mapped, offset)

    def forget(self) -> None:
        """Give the rows' pages back to the system, whose cache keeps them while there is room."""
        if self.mapped is not None:
            forget_pages(self.mapped, self.offset, self.offset + self.packed.nbytes)

    def dequantize(self, out: Float32Array, start: int = 0) -> None:
        """Write the rows from ``start`` on into ``out`` (n, n_in), on as many threads as torch computes with."""
        n_rows, n_in = out.shape

        def work(first: int, stop: int) -> None:
            dequantize_rows(self.packed[start + first : start + stop], self.type, out[first:stop])

        run_rows(n_rows, max(1, _BLOCK_WEIGHTS // n_in), work, torch.get_num_threads())


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A Hugging Face weight (n_out, n_in) as it lies in the file.

    Attributes:
        parts: the tensors' rows that hold it, one after the other.
        stored: which row of the weight each stored row is; None if they are in order.
        place: where the rows of the weight are stored, the inverse of ``stored``.
    """

    parts: tuple[PackedRows, ...]
    n_out: int
    n_in: int
    stored: torch.Tensor | None = None
    place: torch.Tensor | None = None

    def panels(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Ranges of stored rows, and their weights (stop - start, n_in): a buffer that the next panel overwrites.

        What was read of the file is given back at the end. So the process never holds more of the file than a matrix;
        to map pages again that the system's cache has costs a thousandth of a step.
        """
        step, first = max(1, PANEL_WEIGHTS // self.n_in), 0
        for part in self.parts:
            n_rows = len(part.packed)
            for start in range(0, n_rows, step):
                panel = _buffer(min(step, n_rows - start), self.n_in)
                part.dequantize(panel.numpy(), start)
                yield first + start, first + start + len(panel), panel
            part.forget()
            first += n_rows

    def rows(self, numbers: Indices) -> torch.Tensor:
        """Some rows of the weight: float32 (n, n_in)."""
        wanted = numbers if self.place is None else self.place.numpy()[numbers]
        out = np.empty((len(numbers), self.n_in), np.float32)
        first = 0
        for part in self.parts:
            here = np.flatnonzero((wanted >= first) & (wanted < first + len(part.packed)))
            if len(here):
                values = np.empty((len(here), self.n_in), np.float32)
                PackedRows(np.ascontiguousarray(part.packed[wanted[here] - first]), part.type).dequantize(values)
                out[here] = values
            first += len(part.packed)
        return torch.from_numpy(out)


def _buffer(n_rows: int, n_in: int) -> torch.Tensor:
    """This thread's panel."""
    buffer: torch.Tensor | None = getattr(_LOCAL, "panel", None)
    if buffer is None or buffer.numel() < n_rows * n_in:
        buffer = _LOCAL.panel = torch.empty(max(n_rows * n_in, PANEL_WEIGHTS))
    return buffer[: n_rows * n_in].view(n_rows, n_in)


class PackedBase:
    """A GGUF model, mapped read-only: descriptions, packed matrices, and the few weights that are no matrices.

    Attributes:
        path: the file, or the first file of a split model.
        paths: all its files.
        base: its description.
        metadata: its key-value pairs.

    Raises:
        GgufError: if a file is damaged.
    """

    def __init__(self, path: Path) -> None:
        with GgufFile(path) as file:
            self.path, self.paths, self.size = file.path, file.paths, file.size
            self.base: BaseModel = describe(file)
            self.metadata: Metadata = file.metadata
            self._tensors = {name: (part.path, entry) for part in file.parts for name, entry in part.tensors.items()}
        self._mapped = {each: np.memmap(each, np.uint8, "r") for each in self.paths}

    @property
    def largest_tensor(self) -> int:
        """Bytes of the largest tensor in the file."""
        return max(entry.n_rows * entry.type.row_bytes(entry.n_in) for _, entry in self._tensors.values())

    def forget_pages(self) -> None:
        """Let the system take the file's pages out of this process's memory; they are mapped again when read."""
        for content in self._mapped.values():
            mapped = getattr(content, "_mmap", None)
            if mapped is not None:
                forget_pages(mapped)

    def has(self, tensor: str) -> bool:
        """Whether the file has a GGUF tensor of this name."""
        return tensor in self._tensors

    def shape(self, tensor: str) -> Shape:
        """Shape of a GGUF tensor, (n_out, n_in)."""
        return self.base.shapes[tensor]

    def tensor(self, name: str) -> PackedRows:
        """All rows of a GGUF tensor, its leading dimensions flattened."""
        path, entry = self._tensors[name]
        n_bytes = entry.type.row_bytes(entry.n_in)
        content = self._mapped[path][entry.offset : entry.offset + entry.n_rows * n_bytes]
        mapped = getattr(self._mapped[path], "_mmap", None)
        return PackedRows(content.reshape(entry.n_rows, n_bytes), entry.type, mapped, entry.offset)

    def vector(self, name: str) -> Float32Array:
        """The values of a GGUF tensor of one dimension."""
        out = np.empty((1, self.shape(name)[-1]), np.float32)
        self.tensor(name).dequantize(out)
        return out.reshape(-1)

    def slices(self, weight: str) -> list[TensorSlice]:
        """Where a Hugging Face weight lies in the file.

        Raises:
            ArchitectureError: if it has no place there, or its tensor is missing.
        """
        slices = slices_of(self.base, weight)
        missing = [each.tensor for each in slices if not self.has(each.tensor)]
        if not slices or missing:
            raise ArchitectureError(
                f"{self.path}: the model of {self.base.architecture} needs the weight {weight!r}, but the file has "
                f"{f'no tensor {missing[0]!r}' if missing else 'no place for it'}"
            )
        return slices

    def matrix(self, weight: str) -> PackedMatrix:
        """A Hugging Face weight of a matrix product, by its name.

        Raises:
            ArchitectureError: if it has no place in the file, or not as rows.
        """
        slices = self.slices(weight)
        if any(each.columns is not None or each.transposed or each.shift for each in slices):
            raise ArchitectureError(
                f"{self.path}: {weight!r} lies in the file in an order of columns that training cannot multiply with"
            )
        parts = [self._part(each, weight) for each in slices]
        n_out, n_in = sum(len(part.packed) for part in parts), self.shape(slices[0].tensor)[-1]
        stored = _stored_rows(slices, [len(part.packed) for part in parts])
        if stored is None:
            return PackedMatrix(tuple(parts), n_out, n_in)
        place = np.empty(n_out, np.intp)
        place[stored] = np.arange(n_out)
        return PackedMatrix(tuple(parts), n_out, n_in, torch.from_numpy(stored), torch.from_numpy(place))

    def _part(self, tensor_slice: TensorSlice, weight: str) -> PackedRows:
        rows = self.tensor(tensor_slice.tensor)
        shape, start = self.shape(tensor_slice.tensor), tensor_slice.start
        own = shape[-2] if len(shape) > 1 else 1
        count = own if tensor_slice.rows is None else len(tensor_slice.rows)
        if start + count > len(rows.packed):
            raise ArchitectureError(f"{self.path}: tensor {tensor_slice.tensor!r} of shape {shape} has no {weight!r}")
        return rows.part(start, count)

    def dense(self, weight: str, shape: Shape) -> torch.Tensor:
        """A small Hugging Face weight as floats: a norm, a bias, a router.

        Raises:
            ArchitectureError: if it has no place in the file, or another shape.
        """
        out = np.zeros((shape[0], int(np.prod(shape[1:], dtype=int))), np.float32)
        for each in self.slices(weight):
            of_tensor = self.shape(each.tensor)
            stored = self._stored(each, of_tensor)
            values = stored.T if each.transposed else stored
            rows = np.arange(len(values)) if each.rows is None else each.rows
            columns = np.arange(values.shape[1]) if each.columns is None else each.columns
            if len(rows) != len(values) or len(rows) > len(out) or values.shape[1] != out.shape[1]:
                raise ArchitectureError(
                    f"{self.path}: tensor {each.tensor!r} has shape {of_tensor}, which does not fit {weight!r} "
                    f"of shape {tuple(shape)}"
                )
            out[np.ix_(rows, columns)] = values - np.float32(each.shift)
        return torch.from_numpy(out.reshape(shape))

    def _stored(self, each: TensorSlice, shape: Shape) -> Float32Array:
        """A slice's values as they lie in the file: (n_out, n_in), of a vector one column."""
        if len(shape) == 1:
            values = self.vector(each.tensor)
            return values[None, :] if each.transposed else values[:, None]
        part = self.tensor(each.tensor)
        count = shape[-2] if each.rows is None or each.transposed else len(each.rows)
        count = 1 if each.transposed and each.rows is not None else count
        out = np.empty((count, shape[-1]), np.float32)
        part.dequantize(out, each.start)
        return out


def _stored_rows(slices: Sequence[TensorSlice], counts: Sequence[int]) -> Indices | None:
    """Which row of the weight each stored row is; None if they are in order."""
    found, first = [], 0
    for each, count in zip(slices, counts, strict=True):
        found.append(np.arange(first, first + count) if each.rows is None else np.asarray(each.rows, np.intp))
        first += count
    rows = np.concatenate(found)
    return None if (rows == np.arange(len(rows))).all() else rows
