"""Read weights of a Hugging Face directory: safetensors in one file, or in shards with an index.

Rows are read when they are requested, not mapped, so a pass over a large model uses little
memory.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguflora.errors import SafetensorsError
from gguflora.files.safetensors import as_float32, check_gathered, read_header, weight_files
from gguflora.quants.arrays import Float32Array, Indices
from gguflora.system.descriptors import open_file, read_some

_FLOATS: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A stored matrix, (n_rows, n_columns). A vector is one column; a convolution kernel has its last axes flattened.

    Attributes:
        name: name in the Hugging Face model; expert e of a stack is ``<name of the stack>.<e>``.
        file: path of the safetensors file.
        dtype: name of the dtype in safetensors.
        n_rows: number of rows.
        n_columns: number of columns.
        offset: byte offset of the first value in the file.
    """

    name: str
    file: Path
    dtype: str
    n_rows: int
    n_columns: int
    offset: int


class Checkpoint:
    """The weights of a Hugging Face directory, opened read-only.

    Args:
        folder: directory with ``model.safetensors``, or with its index and shards.

    Attributes:
        folder: the directory.
        weights: the stored matrices by name; each expert of a stack is a matrix of its own.

    Raises:
        SafetensorsError: if a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self.weights: dict[str, StoredWeight] = {}
        for path in _shards(folder):
            header, start = read_header(path)
            check_gathered(path, {name: entry["shape"] for name, entry in header.items()})
            for name, entry in header.items():
                for weight in _matrices(path, name, entry, start):
                    self.weights[weight.name] = weight

    def read_rows(self, weight: StoredWeight, rows: Indices) -> Float32Array:
        """Read rows of a weight.

        Args:
            weight: the weight.
            rows: row numbers, in any order.

        Returns:
            float32 array (len(rows), n_columns), in the order of ``rows``.

        Raises:
            SafetensorsError: if the dtype is not a float type, a row does not exist, or the file became shorter.
        """
        if weight.dtype not in _FLOATS:
            raise SafetensorsError(
                f"{weight.file}: tensor {weight.name!r} has dtype {weight.dtype}, expected {', '.join(_FLOATS)}; give "
                "the directory of the unquantized model"
            )
        dtype = np.dtype(_FLOATS[weight.dtype])
        row_bytes = weight.n_columns * dtype.itemsize
        unique, inverse = np.unique(rows, return_inverse=True)
        if len(unique) and not 0 <= unique[0] <= unique[-1] < weight.n_rows:
            raise SafetensorsError(
                f"{weight.file}: {weight.name!r} has {weight.n_rows} rows; row {unique[-1]} does not exist"
            )
        values = np.empty((len(unique), weight.n_columns), dtype)
        raw = memoryview(values.view(np.uint8).reshape(-1).data)
        for start, stop in _runs(unique):
            offset = weight.offset + int(unique[start]) * row_bytes
            self._read(weight, raw[start * row_bytes : stop * row_bytes], offset)
        in_order = values if np.array_equal(inverse, np.arange(len(rows))) else values[inverse]
        return as_float32(in_order)

    def _read(self, weight: StoredWeight, target: memoryview, offset: int) -> None:
        handle = self._open(weight.file)
        while target:
            count = read_some(handle, target, offset)
            if count == 0:
                raise SafetensorsError(f"{weight.file}: ends within {weight.name!r}; was it changed while being read?")
            target, offset = target[count:], offset + count

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = open_file(path)
            return self._files[path]

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for handle in self._files.values():
                os.close(handle)
            self._files.clear()


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        if (folder / _SINGLE).is_file():
            return [folder / _SINGLE]
        found = ", ".join(sorted(entry.name for entry in os.scandir(folder))) or "nothing"
        raise SafetensorsError(f"{folder}: holds neither {_SINGLE} nor {_INDEX}; found: {found:.300}")
    return weight_files(index)


def _matrices(path: Path, name: str, entry: dict[str, Any], data_start: int) -> Iterator[StoredWeight]:
    """Yield the matrices of a tensor: one per expert of a stack; a kernel is flattened, a vector is one column."""
    shape, start = entry["shape"], data_start + entry["data_offsets"][0]
    stop = data_start + entry["data_offsets"][1]
    if len(shape) == 3 and "conv1d" not in name:
        for expert in range(shape[0]):
            offset = start + expert * (stop - start) // shape[0]
            yield StoredWeight(f"{name}.{expert}", path, entry["dtype"], shape[1], shape[2], offset)
    elif shape:
        yield StoredWeight(name, path, entry["dtype"], shape[0], math.prod(shape[1:]), start)


def _runs(numbers: Indices) -> Iterator[tuple[int, int]]:
    """Return positions (start, stop) of the runs of consecutive numbers in an ascending array."""
    edges = np.flatnonzero(np.diff(numbers) != 1) + 1
    bounds = [0, *edges.tolist(), len(numbers)]
    return ((start, stop) for start, stop in pairwise(bounds) if start < stop)
